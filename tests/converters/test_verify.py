"""Only running a model shows that a table means what it should: every mutation here passes the
checks of names and shapes and returns bit for bit, and must fail in logits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converters.native import export_checkpoint, import_checkpoint
from converters.rules import Block, Rule
from converters.verify import verify
from core.errors import ConfigError, ConversionError
from core.testing.distributed import WorkerPool
from core.testing.hf_models import save_hf_model
from models.llama.convert import FAMILY

Change = Callable[[Block], Block]


def exchanged(a: str, b: str) -> Change:
    """Blocks that read tensor `a` in place of `b`, and `b` in place of `a`."""

    def change(block: Block) -> Block:
        (name,) = block.variants
        return replace(block, hf=name.replace(a, "*").replace(b, a).replace("*", b))

    return change


def mutated(change: Change, only: str = "") -> tuple[Rule, ...]:
    return tuple(
        replace(rule, blocks=tuple(change(block) for block in rule.blocks))
        if only in rule.native and len(rule.blocks[0].variants) == 1
        else rule
        for rule in FAMILY.rules
    )


@pytest.mark.parametrize("variant", ["llama", "qwen3_yarn"])
def test_the_table_agrees_with_transformers(tmp_path: Path, variant: str) -> None:
    report = verify(save_hf_model(tmp_path / "hf", variant))
    assert report.passed
    assert report.diverging is None
    assert report.largest_logit > 0.5


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        (mutated(exchanged("gate_proj", "up_proj"), "fc1"), "the output of layer 0"),
        (mutated(exchanged("k_proj", "v_proj"), "qkv"), "the output of layer 0"),
        (mutated(exchanged("q_norm", "k_norm"), "_norm"), "the output of layer 0"),
        (
            mutated(exchanged("input_layernorm", "post_attention_layernorm"), "norm"),
            "the output of layer 0",
        ),
        (mutated(exchanged("model.embed_tokens", "lm_head")), "the embedding"),
    ],
    ids=["gate_up", "k_v", "q_norm_k_norm", "norms", "embedding_head"],
)
def test_exchanged_tensors_pass_every_other_check(
    tmp_path: Path, rules: tuple[Rule, ...], where: str
) -> None:
    folder = save_hf_model(tmp_path / "hf", "qwen3")
    family = replace(FAMILY, rules=rules)
    import_checkpoint(folder, tmp_path / "native", 2, family)
    back = export_checkpoint(tmp_path / "native", tmp_path / "back", family=family)
    before, after = (load_file(path / "model.safetensors") for path in (folder, back))
    assert all(before[name].equal(after[name]) for name in before)

    report = verify(folder, family)
    assert not report.passed
    assert report.diverging == where
    assert where in str(report)


class Renumbered(str):
    """A name whose layer is another one's."""

    order: tuple[int, ...]

    def format_map(self, at: Mapping[str, int], /) -> str:  # type: ignore[override]
        return super().format_map({name: self.order[value] for name, value in at.items()})


@pytest.mark.parametrize(("order", "first"), [((1, 2, 0), 0), ((0, 2, 1), 1)])
def test_layers_off_by_one_are_found_where_they_begin(
    tmp_path: Path, order: tuple[int, ...], first: int
) -> None:
    def renumbered(block: Block) -> Block:
        name = Renumbered(*block.variants)
        name.order = order
        return replace(block, hf=name)

    folder = save_hf_model(tmp_path / "hf", "mistral")
    report = verify(folder, replace(FAMILY, rules=mutated(renumbered)))
    assert not report.passed
    assert report.diverging == f"the output of layer {first}"


def test_several_processes_agree_as_one(tmp_path: Path, pool: WorkerPool) -> None:
    """kv heads 2 on 4 ranks, vocabulary 67."""
    report = verify(save_hf_model(tmp_path / "hf", "qwen2"), tp=4, pool=pool)
    assert report.passed
    assert report.tp == 4


def test_a_layout_that_does_not_divide_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads 8"):
        verify(save_hf_model(tmp_path / "hf", "qwen2"), tp=3)


@pytest.mark.parametrize("tp", [1, 2])
def test_more_tokens_than_positions_are_refused(tmp_path: Path, tp: int) -> None:
    """Not by the failure of a process, or of transformers."""
    folder = save_hf_model(tmp_path / "hf", "gpt2")
    with pytest.raises(ConfigError, match="--length 129 is above the 128 positions"):
        verify(folder, tp=tp, length=129)


def test_a_family_must_say_how_to_verify(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="says nothing of how to verify"):
        verify(save_hf_model(tmp_path / "hf", "llama"), replace(FAMILY, probe=None))


def test_not_a_number_does_not_agree(tmp_path: Path) -> None:
    folder = save_hf_model(tmp_path / "hf", "llama")
    content = load_file(folder / "model.safetensors")
    content["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    report = verify(folder)
    assert not report.passed
    assert report.diverging == "the output of layer 1"
