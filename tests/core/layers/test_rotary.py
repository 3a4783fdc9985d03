from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from core.config.transformer import RopeConfig
from core.layers.rotary import RotaryEmbedding, attention_factor, inverse_frequencies

CPU = torch.device("cpu")

LLAMA31 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 2": (128, {"theta": 10000.0}),
    "Llama 3": (128, {"theta": 500000.0}),
    "small head": (6, {"theta": 1e6}),
    "linear": (64, {"type": "linear", "factor": 4.0}),
    "linear, a third": (80, {"type": "linear", "factor": 3.0, "theta": 1e6}),
    "Llama 3.1": (128, {"theta": 500000.0, **LLAMA31}),
    "Llama 3.2": (64, {"theta": 500000.0, **LLAMA31, "factor": 32.0}),
    "llama3, other bands": (
        96,
        {**LLAMA31, "low_freq_factor": 2.0, "high_freq_factor": 9.0, "factor": 3.0},
    ),
    "Qwen 2.5 yarn": (128, {"theta": 1e6, **YARN}),
    "yarn, other betas": (64, {"theta": 1e5, **YARN, "beta_fast": 20.0, "beta_slow": 3.0}),
    "yarn, own factor": (64, {"theta": 1e5, **YARN, "attention_factor": 0.7}),
    "yarn, short": (64, {**YARN, "factor": 0.5}),
    "DeepSeek yarn": (
        64,
        {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
    ),
    "yarn, mscale alone": (64, {**YARN, "factor": 40.0, "mscale": 0.707}),
    "gpt-oss yarn": (64, {"theta": 150000.0, **YARN, "factor": 32.0, "truncate": False}),
    "yarn, ends that meet": (64, {**YARN, "beta_fast": 1.0, "truncate": False}),
    "yarn, ends outside": (8, {**YARN, "original_max_position_embeddings": 16}),
}


def _hugging_face(head_dim: int, options: dict[str, Any]) -> LlamaConfig:
    """The same in Hugging Face's words."""
    names = {"theta": "rope_theta", "type": "rope_type"}
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    rope |= {names.get(key, key): value for key, value in options.items()}
    context = options.get("original_max_position_embeddings", 8192)
    return LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=int(context * options.get("factor", 1.0)),
        rope_parameters=rope,
    )


@pytest.mark.parametrize("name", CASES)
def test_is_hugging_faces(name: str) -> None:
    head_dim, options = CASES[name]
    rope, config = RopeConfig(**options), _hugging_face(head_dim, options)
    theirs = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(rope, head_dim)
    assert frequencies.dtype == torch.float32
    if rope.type == "yarn":
        torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=2.0**-22, atol=0.0)
    else:
        assert torch.equal(frequencies, theirs.inv_freq)
    assert attention_factor(rope) == pytest.approx(theirs.attention_scaling, rel=1e-15)

    cos, sin = RotaryEmbedding(rope, head_dim)(40, CPU)
    expected = theirs(torch.empty(0), torch.arange(40)[None])
    for ours, table in zip((cos, sin), expected, strict=True):
        torch.testing.assert_close(ours, table[0], rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_partial_rotary(kind: str) -> None:
    options = {"linear": {"type": "linear", "factor": 4.0}, "llama3": LLAMA31, "yarn": YARN}[kind]
    config = _hugging_face(64, {**options, "partial_rotary_factor": 0.25})
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, CPU)
    rope = RopeConfig(**options, partial_factor=0.25)  # type: ignore[arg-type]
    frequencies = inverse_frequencies(rope, 64)
    assert frequencies.shape == (8,)
    torch.testing.assert_close(frequencies, expected, rtol=2.0**-22, atol=0.0)
    assert RotaryEmbedding(rope, 64)(5, CPU)[0].shape == (5, 16)


def test_scaling_is_not_plain() -> None:
    plain = inverse_frequencies(RopeConfig(), 64)
    for options in ({"type": "linear", "factor": 4.0}, LLAMA31, YARN):
        assert not torch.equal(inverse_frequencies(RopeConfig(**options), 64), plain)  # type: ignore[arg-type]


def test_tables_of_any_length_are_parts_of_one() -> None:
    rotary = RotaryEmbedding(RopeConfig(), 8)
    early = rotary(4, CPU)[0]
    whole = rotary(20, CPU)[0]
    assert torch.equal(early, whole[:4])
    assert torch.equal(rotary(7, CPU)[0], whole[:7])


def test_tables_at_positions() -> None:
    rotary = RotaryEmbedding(RopeConfig(), 8)
    positions = torch.tensor([[0, 1, 0], [5, 6, 7]])
    for table, whole in zip(rotary.at(positions, 8, CPU), rotary(8, CPU), strict=True):
        assert table.shape == (3, 2, 8)
        assert torch.equal(table[:, 0], whole[[0, 1, 0]])
        assert torch.equal(table[:, 1], whole[5:8])
    assert torch.equal(rotary.at(None, 4, CPU)[1], rotary(4, CPU)[1])


def test_generation_first_does_not_spoil_training() -> None:
    rotary = RotaryEmbedding(RopeConfig(), 8)
    with torch.inference_mode():
        rotary(4, CPU)
    x = torch.ones(4, 8, requires_grad=True)
    (x * rotary(4, CPU)[0]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, rotary(4, CPU)[0])
