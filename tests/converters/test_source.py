import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converters.source import check_tokenizer, load_into, open_source
from core.errors import ConfigError, ConversionError
from core.parallel.context import Axis, ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.testing.hf_models import save_hf_model
from models.llama.convert import FAMILY, import_weights
from models.llama.model import build_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(folder: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """Change tensors of a folder with one weight file; None removes one."""
    content = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: value for name, value in content.items() if value is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def edit_config(folder: Path, **entries: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


def head_like(folder: Path) -> Tensor:
    return load_file(folder / "model.safetensors")[EMBEDDING].clone()


def test_tying_is_seen_in_the_tensors(tmp_path: Path) -> None:
    tied = save_hf_model(tmp_path / "tied", "qwen2")
    assert open_source(tied).config.tie_embeddings

    both = edit(save_hf_model(tmp_path / "both", "qwen2"), {HEAD: head_like(tied)})
    source = open_source(both)
    assert source.config.tie_embeddings
    assert source.ignored == {HEAD: "the same as the embedding"}

    changed = head_like(tied)
    changed[5, 7] += 1e-3
    differ = edit(save_hf_model(tmp_path / "differ", "qwen2"), {HEAD: changed})
    assert not open_source(differ).config.tie_embeddings

    only_head = edit(
        save_hf_model(tmp_path / "head", "qwen2"),
        {EMBEDDING: None, HEAD: head_like(tied)},
    )
    source = open_source(only_head)
    assert source.config.tie_embeddings
    assert source.plan.by_native["embedding.word_embeddings.weight"][0].hf == HEAD


def test_a_lost_head_is_not_taken_for_a_tied_one(tmp_path: Path) -> None:
    folder = edit(save_hf_model(tmp_path / "x", "llama"), {HEAD: None})
    with pytest.raises(ConversionError, match=rf"missing: {HEAD}"):
        open_source(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"missing: model\.layers\.1\.mlp\.up_proj"),
        ({"model.layers.3.mlp.up_proj.weight": torch.ones(48, 40)}, r"not part.*layers\.3\.mlp"),
        (
            {"model.norm.weight": torch.ones(41)},
            r"model\.norm\.weight is \[41\] and must be \[40\]",
        ),
        (
            {"model.layers.0.self_attn.k_proj.bias": torch.ones(12).double()},
            r"q_proj\.bias is torch\.float32 and .*k_proj\.bias is torch\.float64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    folder = edit(save_hf_model(tmp_path / "x", "llama"), change)
    with pytest.raises(ConversionError, match=words):
        open_source(folder)


def test_a_known_leftover_is_ignored_with_its_reason(tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    folder = save_hf_model(tmp_path / "x", "llama")
    edit(folder, {name: torch.ones(3)})
    assert open_source(folder).ignored == {name: "computed from config.json"}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
    ],
)
def test_configs_that_cannot_be_mapped_are_refused(
    tmp_path: Path, entries: dict[str, Any], words: str
) -> None:
    folder = edit_config(save_hf_model(tmp_path / "x", "llama"), **entries)
    with pytest.raises(ConversionError, match=words):
        open_source(folder)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = edit_config(save_hf_model(tmp_path / "x", "llama"), num_key_value_heads=3)
    with pytest.raises(ConfigError, match="num_attention_heads 8 is not a multiple"):
        open_source(folder)


def test_a_folder_of_another_family_is_refused(tmp_path: Path) -> None:
    other = replace(FAMILY, name="other", architectures=("OtherForCausalLM",))
    with pytest.raises(ConversionError, match="LlamaForCausalLM is not of the family other"):
        open_source(save_hf_model(tmp_path / "x", "llama"), other)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = save_hf_model(tmp_path / "x", "llama")
    config = open_source(folder).config
    for size, fits in ((67, True), (68, False)):
        vocabulary = {f"t{i}": i for i in range(size)}
        Tokenizer(WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
        if fits:
            check_tokenizer(folder, FAMILY, config)
        else:
            with pytest.raises(ConversionError, match="68 tokens and the model a vocabulary of 67"):
                check_tokenizer(folder, FAMILY, config)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_live_parameters_hold_this_ranks_part(tmp_path: Path, variant: str, tp: int) -> None:
    """Against slices written down by hand: q heads, k and v heads (2, replicated beyond tp 2),
    halves of gate and up, columns of the row-parallel weights, rows of the padded vocabulary."""
    folder = save_hf_model(tmp_path / "x", variant)
    content = load_file(folder / "model.safetensors")
    config = open_source(folder).config
    for rank in range(tp):
        axis = Axis("tp", tp, rank, tuple(range(tp)), None)
        ctx = replace(ParallelContext.single(), tp=axis)
        model = build_llama(config, Placement(ctx, torch.float64, torch.device("cpu")))
        for declared in declared_parameters(model).values():
            for copy in declared.sharding.copies:
                declared.parameter.data[copy.local.slices] = torch.nan
        import_weights(folder, config, declared_parameters(model))
        held = {name: value.detach() for name, value in model.named_parameters()}

        kv_head = slice(rank * 2 // tp * 6, (rank * 2 // tp + max(1, 2 // tp)) * 6)
        for kind in ("weight", "bias"):
            name = f"model.layers.1.self_attn.{{}}_proj.{kind}"
            if name.format("q") not in content:
                continue
            q, k, v = (content[name.format(part)] for part in "qkv")
            qkv = torch.cat([q.chunk(tp)[rank], k[kv_head], v[kv_head]])
            own = held[f"decoder.layers.1.self_attention.linear_qkv.{kind}"]
            assert torch.equal(own, qkv.double())
        gate_up = [content[f"model.layers.2.mlp.{p}_proj.weight"] for p in ("gate", "up")]
        fc1 = torch.cat([part.chunk(tp)[rank] for part in gate_up])
        assert torch.equal(held["decoder.layers.2.mlp.linear_fc1.weight"], fc1.double())
        down = content["model.layers.0.mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
        assert torch.equal(held["decoder.layers.0.mlp.linear_fc2.weight"], down.double())
        table = held["embedding.word_embeddings.weight"]
        rows = table.shape[0]
        padded = torch.zeros(rows * tp, 40)
        padded[:67] = content[EMBEDDING]
        assert torch.equal(table, padded.chunk(tp)[rank].double())


def test_another_model_is_not_filled(tmp_path: Path) -> None:
    source = open_source(save_hf_model(tmp_path / "x", "llama"))
    place = Placement(ParallelContext.single(), torch.float32, torch.device("cpu"))
    parameters = declared_parameters(build_llama(source.config, place))
    with pytest.raises(ConversionError, match=r"norm_epsilon: 0\.1 and 3e-05"):
        load_into(parameters, source, replace(source.config, norm_epsilon=0.1))
    # Dropout and initial weights are the run's own business; defaults may be left unsaid.
    mine = replace(source.config, attention_dropout=0.1, init_std=0.5, max_position_embeddings=9)
    assert load_into(parameters, source, mine)["family"] == "llama"
    wider = declared_parameters(build_llama(replace(source.config, ffn_hidden_size=50), place))
    with pytest.raises(ConversionError, match=r"linear_fc1\.weight is \[100, 40\]"):
        load_into(wider, source)


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_pipeline_stages_are_filled(tmp_path: Path, variant: str) -> None:
    """Each with its own parameters; a tied table on both ends."""
    folder = save_hf_model(tmp_path / "x", variant)
    config = open_source(folder).config
    place = Placement(ParallelContext.single(), torch.float64, torch.device("cpu"))
    whole = declared_parameters(build_llama(config, place))
    import_weights(folder, config, whole)
    seen: set[str] = set()
    for parts in (range(2), range(2, 3), range(3, config.num_layers + 2)):
        piece = declared_parameters(build_llama(config, replace(place, parts=parts)))
        import_weights(folder, config, piece)
        assert piece.keys() & seen <= {"embedding.word_embeddings.weight"}
        seen |= piece.keys()
        for name, declared in piece.items():
            assert torch.equal(declared.local, whole[name].local)
    assert seen == whole.keys()
