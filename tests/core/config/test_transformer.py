import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest

from core.config.transformer import (
    TRANSFORMER_RULES,
    RopeConfig,
    TransformerConfig,
    validate_attention,
    validate_layout,
    validate_transformer,
)
from core.errors import ConfigError


def config(**changes: Any) -> TransformerConfig:
    base = TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=2,
        ffn_hidden_size=96,
        vocab_size=100,
        max_position_embeddings=128,
    )
    return dataclasses.replace(base, **changes)


LLAMA3 = RopeConfig(type="llama3", factor=8.0, original_max_position_embeddings=32)

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("_sizes_are_positive", {"num_layers": 0}, "num_layers is 0: it must be at least 1"),
    ("_sizes_are_positive", {"hidden_size": -64}, "hidden_size is -64"),
    ("_sizes_are_positive", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("_sizes_are_positive", {"ffn_hidden_size": 0}, "ffn_hidden_size is 0"),
    ("_sizes_are_positive", {"vocab_size": 0}, "vocab_size is 0"),
    ("_sizes_are_positive", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ("_heads_divide", {"num_query_groups": 3}, "num_attention_heads 8 .* num_query_groups 3"),
    ("_heads_divide", {"hidden_size": 65}, "hidden_size 65 .* num_attention_heads 8"),
    ("_rope_is_complete", {"rope": RopeConfig(factor=2.0)}, "rope.factor 2.0 does nothing"),
    ("_rope_is_complete", {"rope": RopeConfig(theta=float("nan"))}, "rope.theta is nan"),
    ("_sizes_are_positive", {"num_query_groups": 0}, "num_query_groups is 0"),
    ("_sizes_are_positive", {"norm_epsilon": 0.0}, "norm_epsilon is 0.0"),
    ("_rope_is_complete", {"rope": RopeConfig(partial_factor=0.4)}, "rotates 3 dimensions"),
    ("_rope_is_complete", {"rope": RopeConfig(partial_factor=0.0)}, "rope.partial_factor is 0.0"),
    ("_rope_is_complete", {"rope": RopeConfig(partial_factor=2.0)}, "rotates 16 dimensions"),
    ("_rope_is_complete", {"rope": RopeConfig(type="yarn", factor=2.0)}, "yarn needs rope.orig"),
    ("_rope_is_complete", {"rope": RopeConfig(type="llama3", factor=2.0)}, "llama3 needs rope.o"),
    (
        "_rope_is_complete",
        {"rope": dataclasses.replace(LLAMA3, low_freq_factor=4.0)},
        "high_freq_factor 4.0 must be above rope.low_freq_factor 4.0",
    ),
    (
        "_rope_is_complete",
        {"position_embedding": "none", "rope": RopeConfig(theta=5.0)},
        "do nothing with position_embedding none",
    ),
    (
        "_rope_is_complete",
        {"position_embedding": "learned", "rope": RopeConfig(partial_factor=0.25)},
        "do nothing with position_embedding learned",
    ),
    ("_window_is_used", {"sliding_window": 0}, "sliding_window is 0: it must be at least 1"),
    ("_window_is_used", {"sliding_window_layers": (0,)}, "does nothing without sliding_window"),
    (
        "_window_is_used",
        {"sliding_window": 8, "sliding_window_layers": (0, 4)},
        r"names \[4\], but there are 4 layers",
    ),
    ("_probabilities", {"attention_dropout": 1.0}, "attention_dropout is 1.0"),
    ("_probabilities", {"hidden_dropout": -0.1}, "hidden_dropout is -0.1"),
    ("_attention_scale_is_positive", {"attention_scale": 0.0}, "attention_scale is 0.0"),
]

SOUND: list[dict[str, Any]] = [
    {},
    {"num_query_groups": None},
    {"num_query_groups": 8},
    {"hidden_size": 65, "head_dim": 16},
    {"rope": LLAMA3},
    {"rope": RopeConfig(partial_factor=0.25)},
    {"rope": RopeConfig(type="linear", factor=2.0)},
    {"rope": RopeConfig(type="yarn", factor=2.0, original_max_position_embeddings=32)},
    {"position_embedding": "none"},
    {"position_embedding": "learned", "parallel_residual": True},
    {"sliding_window": 1},
    {"sliding_window": 8, "sliding_window_layers": (0, 3)},
    {"attention_dropout": 0.1, "hidden_dropout": 0.999},
]


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_broken_rule_says_what_and_why(rule: str, changes: dict[str, Any], message: str) -> None:
    broken = config(**changes)
    with pytest.raises(ConfigError, match=message):
        validate_transformer(broken)
    [named] = [item for item in TRANSFORMER_RULES if item.__name__ == rule]
    with pytest.raises(ConfigError, match=message):
        named(broken)


def test_every_rule_has_a_broken_case() -> None:
    assert {rule.__name__ for rule in TRANSFORMER_RULES} == {rule for rule, _, _ in BROKEN}


@pytest.mark.parametrize("changes", SOUND)
def test_sound_config_passes(changes: dict[str, Any]) -> None:
    validate_transformer(config(**changes))


@pytest.mark.parametrize(
    ("changes", "tp", "sequence_parallel", "message"),
    [
        ({}, 3, False, "num_attention_heads 8 .* over tp 3"),
        ({"num_attention_heads": 12, "num_query_groups": 3}, 2, False, "num_query_groups 3 nei"),
        ({"ffn_hidden_size": 97}, 2, False, "ffn_hidden_size 97 .* over tp 2"),
        ({}, 4, True, "--data.seq-length 30 .* over tp 4"),
    ],
)
def test_layout_that_does_not_divide(
    changes: dict[str, Any], tp: int, sequence_parallel: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_layout(config(**changes), tp, sequence_parallel=sequence_parallel, seq_length=30)


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "seq_length"),
    [(1, False, 30), (2, True, 30), (4, False, 30), (8, True, 32)],
)
def test_layout_that_divides(tp: int, sequence_parallel: bool, seq_length: int) -> None:
    # With tp 4 and 8, the two kv heads are replicated.
    validate_layout(config(), tp, sequence_parallel=sequence_parallel, seq_length=seq_length)


def test_derived_sizes() -> None:
    assert (config().kv_heads, config().kv_channels) == (2, 8)
    assert (config(num_query_groups=None).kv_heads, config(head_dim=32).kv_channels) == (8, 32)
    assert config(init_std=0.08).output_init_std == pytest.approx(0.08 / 8**0.5)
    assert config(init_std=0.08, scale_output_init=False).output_init_std == 0.08


def test_window_of_a_layer() -> None:
    assert config().window_of(0) is None
    assert [config(sliding_window=8).window_of(i) for i in range(4)] == [8] * 4
    mixed = config(sliding_window=8, sliding_window_layers=(1, 3))
    assert [mixed.window_of(i) for i in range(4)] == [None, 8, None, 8]


def test_flops_of_llama3_8b_at_8192() -> None:
    # 8 layers of Llama 3 8B: the two conventions as other trainers report them.
    model = TransformerConfig(
        num_layers=8,
        hidden_size=4096,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=14336,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    gemms = 6 * (8 * layer + 128256 * 4096)
    scores = 12 * 8 * 4096 * 8192
    assert model.flops_per_token(8192, causal=False) == gemms + scores
    assert model.flops_per_token(8192, causal=True) == gemms + scores / 2


def test_flops_count_only_keys_in_the_window() -> None:
    full = config().flops_per_token(64, causal=True)
    windowed = config(sliding_window=16).flops_per_token(64, causal=True)
    # Keys a token sees; the causal convention counts half of the token itself.
    keys = [min(i + 0.5, 16) for i in range(64)]
    assert full - windowed == pytest.approx(12 * 4 * 64 * (32 - sum(keys) / 64))
    assert config(sliding_window=999).flops_per_token(64, causal=True) == full


@pytest.mark.parametrize(
    ("device", "changes", "seq_length", "refused"),
    [
        ("cuda", {"sliding_window": 8}, 9, True),
        ("cuda", {"sliding_window": 8}, 8, False),
        ("cuda", {"sliding_window": 8, "sliding_window_layers": ()}, 9, False),
        ("cuda", {"sliding_window": 8, "attention_dropout": 0.0}, 9, False),
        ("cuda", {}, 9, False),
        ("cpu", {"sliding_window": 8}, 9, False),
    ],
)
def test_dropout_within_a_window_has_no_kernel_on_a_gpu(
    device: str, changes: dict[str, Any], seq_length: int, refused: bool
) -> None:
    model = config(**{"attention_dropout": 0.1, **changes})
    expected = pytest.raises(ConfigError, match=r"sliding_window of 8 below --data.seq-length 9")
    with expected if refused else nullcontext():
        validate_attention(model, device, seq_length=seq_length)
