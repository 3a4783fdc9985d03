"""Logits of GPT-2 and GPT-NeoX at tp, sp and pp against transformers in fp32, and tables that are
wrong in a way that only logits show."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.native import export_checkpoint, import_checkpoint
from converters.plan import make_plan
from converters.rules import Family, Rule, Size
from converters.source import load_into, open_source
from converters.verify import verify
from core.config.parallel import ParallelConfig
from core.parallel.collectives import gather_last
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.hf_models import GPT, save_hf_model, tiny_hf_model
from models.gpt.convert import FAMILY
from models.gpt.model import build_gpt

LIMIT = 1e-4
"""Of the largest logit."""
B, S, H = 2, 48, {"gpt2": 48, "gpt2_untied": 48, "neox": 64, "neox_serial": 64}

Change = Callable[[Rule], Rule]


def _k_and_v_exchanged(rule: Rule) -> Rule:
    if "linear_qkv" not in rule.native:
        return rule
    q, k, v = rule.blocks
    return replace(rule, blocks=(q, v, k))


def _square_weights_not_transposed(rule: Rule) -> Rule:
    square = "linear_proj" in rule.native or "mlp" in rule.native
    return replace(rule, transposed=False) if square else rule


def _c_proj_not_transposed(rule: Rule) -> Rule:
    return replace(rule, transposed=False) if "linear_proj" in rule.native else rule


def _read_as_blocks(rule: Rule) -> Rule:
    """Per-head qkv read as if all queries came first."""
    if "linear_qkv" not in rule.native:
        return rule
    starts: tuple[Size, ...] = (0, "attention", "2 attention")
    blocks = zip(rule.blocks, starts, strict=True)
    return replace(rule, blocks=tuple(replace(b, start=start, pitch=0) for b, start in blocks))


MUTATIONS: Mapping[str, Change] = {
    "k and v": _k_and_v_exchanged,
    "transposes": _square_weights_not_transposed,
    "c_proj": _c_proj_not_transposed,
    "blocks for heads": _read_as_blocks,
}


def _family(mutation: str | None) -> Family:
    if mutation is None:
        return FAMILY
    return replace(FAMILY, rules=tuple(MUTATIONS[mutation](rule) for rule in FAMILY.rules))


def _tokens() -> Tensor:
    return torch.randint(0, 67, (B, S), generator=torch.Generator().manual_seed(9))


def _run(folder: Path, ctx: ParallelContext, hidden: int, mutation: str | None) -> Tensor:
    """Logits, on the last stage; on the others what they hand on."""
    source = open_source(folder, _family(mutation))
    # Embedding and one layer | two layers and head.
    parts = None if ctx.pp.size == 1 else (range(2), range(2, 5))[ctx.pp.rank]
    place = Placement(ctx, torch.float32, ctx.device, parts)
    model = build_gpt(source.config, place).eval()
    load_into(declared_parameters(model), source, source.config)
    with torch.no_grad():
        if ctx.pp.size == 1:
            return model.logits(_tokens()).clone()
        if ctx.pp.rank == 0:
            out = model.hidden_states(_tokens()).contiguous()
            dist.send(out, ctx.pp.ranks[1])
            return out
        received = torch.empty(S // (ctx.tp.size if ctx.sequence_parallel else 1), B, hidden)
        dist.recv(received, ctx.pp.ranks[0])
        head = model.output_layer
        assert head is not None
        local = head(model.hidden_states(_tokens(), received=received))
        return gather_last(local, ctx.tp)[..., :67].transpose(0, 1).contiguous()


def _logits(
    folders: dict[str, Path], tp: int, pp: int, sequence_parallel: bool, mutation: str | None
) -> dict[str, Tensor] | None:
    config = ParallelConfig(tp=tp, pp=pp, sequence_parallel=sequence_parallel)
    ctx = ParallelContext.create(config, torch.device("cpu"))
    found = {name: _run(path, ctx, H[name], mutation) for name, path in folders.items()}
    return found if ctx.pp.rank == pp - 1 else None


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Every variant: its folder, and the logits of transformers."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for variant in GPT:
        with torch.no_grad():
            logits = tiny_hf_model(variant)(_tokens()).logits
        found[variant] = (save_hf_model(root / variant, variant), logits)
    return found


@pytest.mark.parametrize(
    ("tp", "pp", "sequence_parallel"),
    [
        *((1, 1, False), (1, 2, False)),
        *((2, 1, False), (2, 2, False), (2, 2, True)),
        *((4, 1, False), (4, 1, True), (4, 2, False), (4, 2, True)),
    ],
)
def test_logits_are_those_of_transformers(
    pool: WorkerPool,
    saved: dict[str, tuple[Path, Tensor]],
    tp: int,
    pp: int,
    sequence_parallel: bool,
) -> None:
    folders = {variant: folder for variant, (folder, _) in saved.items()}
    ranks = pool.run(_logits, tp * pp, folders, tp, pp, sequence_parallel, None)
    last = [found for found in ranks if found is not None]
    assert len(last) == tp
    for found in last:
        for variant, (_, expected) in saved.items():
            difference = (found[variant] - expected).abs().max().item()
            assert difference <= LIMIT * expected.abs().max().item(), variant


def test_a_square_weight_that_is_not_transposed_shows_at_tp_2(
    pool: WorkerPool, saved: dict[str, tuple[Path, Tensor]]
) -> None:
    folder, expected = saved["gpt2"]
    found = pool.run(_logits, 2, {"gpt2": folder}, 2, 1, False, "c_proj")[0]["gpt2"]
    difference = (found - expected).abs().max().item()
    assert difference > 1e3 * LIMIT * expected.abs().max().item()


@pytest.mark.parametrize(
    ("variant", "mutation"),
    [
        ("gpt2", "k and v"),
        ("gpt2", "transposes"),
        ("gpt2", "c_proj"),
        ("neox", "k and v"),
        ("neox", "blocks for heads"),
    ],
)
def test_a_wrong_table_passes_every_check_but_logits(
    tmp_path: Path, saved: dict[str, tuple[Path, Tensor]], variant: str, mutation: str
) -> None:
    """The round trip is bit-exact, since export reads the same table from right to left."""
    folder, family = saved[variant][0], _family(mutation)
    import_checkpoint(folder, tmp_path / "native", 2, family)
    back = export_checkpoint(tmp_path / "native", tmp_path / "back", family=family)
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert verify(folder).passed
    report = verify(folder, family)
    assert not report.passed
    assert report.diverging == "the output of layer 0"


def test_only_c_attn_would_show_a_missing_transpose_in_its_shape(
    saved: dict[str, tuple[Path, Tensor]],
) -> None:
    source = open_source(saved["gpt2"][0])
    plain = make_plan(_family("transposes"), source.config, source.folder.shapes)
    assert plain.hf_shapes == source.plan.hf_shapes
    transposed = {name for name, copies in source.plan.by_hf.items() if copies[0].transposed}
    kinds = {name.split("h.")[1].partition(".")[2] for name in transposed}
    assert kinds == {
        *("attn.c_attn.weight", "attn.c_proj.weight"),
        *("mlp.c_fc.weight", "mlp.c_proj.weight"),
    }
    assert len(transposed) == 4 * 3


def _with_masks(content: Mapping[str, Tensor], attention: str, layers: int) -> dict[str, Tensor]:
    """With the buffers that old files hold, as they were written: bytes or numbers."""
    masks: dict[str, Tensor] = {}
    for i in range(layers):
        name = attention.format(i)
        masks[f"{name}.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()
        masks[f"{name}.masked_bias"] = torch.tensor(-1e9)
        if "gpt_neox" in name:
            masks[f"{name}.rotary_emb.inv_freq"] = torch.ones(2)
    return {**content, **masks}


def test_old_files_of_gpt2_have_other_names(
    tmp_path: Path, saved: dict[str, tuple[Path, Tensor]]
) -> None:
    """Without `transformer.`, with masks, and with the tied head written out."""
    folder = save_hf_model(tmp_path / "hf", "gpt2")
    content = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in content.items()}
    assert "h.1.attn.c_proj.weight" in bare
    old = _with_masks({**bare, "lm_head.weight": bare["wte.weight"].clone()}, "h.{}.attn", 3)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    source = open_source(folder)
    assert source.config == open_source(saved["gpt2"][0]).config
    assert set(source.ignored.values()) == {"a causal mask", "the same as the embedding"}
    assert len(source.ignored) == 2 * 3 + 1
    assert verify(folder).passed
    import_checkpoint(folder, tmp_path / "native", 4)
    back = load_file(export_checkpoint(tmp_path / "native", tmp_path / "back") / SINGLE)
    assert back.keys() == bare.keys()
    assert all(back[name].equal(bare[name]) for name in bare)


def test_the_head_of_neox_has_two_names_and_old_files_have_buffers(tmp_path: Path) -> None:
    folder = save_hf_model(tmp_path / "hf", "neox")
    content = load_file(folder / "model.safetensors")
    assert "embed_out.weight" in content
    content["lm_head.weight"] = content.pop("embed_out.weight")
    old = _with_masks(content, "gpt_neox.layers.{}.attention", 3)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    source = open_source(folder)
    assert set(source.ignored.values()) == {"a causal mask", "computed from config.json"}
    assert len(source.ignored) == 3 * 3
    assert verify(folder).passed
    import_checkpoint(folder, tmp_path / "native", 2)
    back = load_file(export_checkpoint(tmp_path / "native", tmp_path / "back") / SINGLE)
    assert back.keys() == content.keys()
    assert all(back[name].equal(content[name]) for name in content)


SINGLE = "model.safetensors"


@pytest.mark.parametrize(("variant", "head"), [("gpt2", "lm_head"), ("neox_serial", "embed_out")])
def test_a_head_that_differs_is_not_tied(tmp_path: Path, variant: str, head: str) -> None:
    folder = save_hf_model(tmp_path / "hf", variant)
    content = load_file(folder / SINGLE)
    table = next(name for name in content if name.endswith(("wte.weight", "embed_in.weight")))
    save_file({**content, f"{head}.weight": content[table] + 1}, folder / SINGLE)
    assert not open_source(folder).config.tie_embeddings
