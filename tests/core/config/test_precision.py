import dataclasses
import math
from typing import Any

import pytest

from core.config.parallel import ParallelConfig
from core.config.precision import (
    PRECISION_RULES,
    PrecisionConfig,
    bf16_layers,
    validate_fp8,
    validate_precision,
)
from core.config.transformer import TransformerConfig
from core.errors import ConfigError

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    (
        "_loss_scale_only_for_fp16",
        {"dtype": "bf16", "initial_loss_scale": 8.0},
        "do nothing with --precision.dtype bf16",
    ),
    ("_loss_scale_only_for_fp16", {"dtype": "fp32", "loss_scale_window": 8}, "dtype fp32"),
    ("_loss_scale_can_work", {"dtype": "fp16", "loss_scale_window": 0}, "scale-window is 0"),
    ("_loss_scale_can_work", {"dtype": "fp16", "loss_scale_hysteresis": 0}, "hysteresis is 0"),
    ("_loss_scale_can_work", {"dtype": "fp16", "min_loss_scale": 0.0}, "scale is 0.0 and"),
    ("_loss_scale_can_work", {"dtype": "fp16", "min_loss_scale": 1e6}, "not above the second"),
    ("_loss_scale_can_work", {"dtype": "fp16", "initial_loss_scale": -1.0}, "scale -1.0: they"),
    ("_loss_scale_can_work", {"dtype": "fp16", "initial_loss_scale": math.inf}, "scale inf"),
    ("_loss_scale_can_work", {"dtype": "fp16", "initial_loss_scale": math.nan}, "scale nan"),
    (
        "_memory_formats_save_something",
        {"dtype": "fp16", "master_weights": "remainder"},
        "--precision.master-weights remainder completes bf16 parameters, those of .*dtype fp16",
    ),
    (
        "_memory_formats_save_something",
        {"dtype": "fp32", "master_weights": "remainder"},
        "dtype fp32 have another format",
    ),
    (
        "_memory_formats_save_something",
        {"dtype": "fp64", "moments": "bf16"},
        "--precision.moments bf16 does not fit --precision.dtype fp64",
    ),
    ("_fp8_needs_bf16", {"dtype": "fp32", "fp8": "current"}, "fp8 current completes .* not fp32"),
    (
        "_fp8_layers_do_something",
        {"fp8_bf16_first_layers": 1},
        "--precision.fp8-bf16-first-layers 1 does nothing without --precision.fp8",
    ),
    (
        "_fp8_layers_do_something",
        {"fp8": "current", "fp8_bf16_last_layers": -1},
        "--precision.fp8-bf16-last-layers is -1: it must be at least 0",
    ),
]


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_broken_rule_says_what_and_why(rule: str, changes: dict[str, Any], message: str) -> None:
    broken = PrecisionConfig(**changes)
    with pytest.raises(ConfigError, match=message):
        validate_precision(broken)
    [named] = [item for item in PRECISION_RULES if item.__name__ == rule]
    with pytest.raises(ConfigError, match=message):
        named(broken)


def test_every_rule_has_a_broken_case() -> None:
    assert {rule.__name__ for rule in PRECISION_RULES} == {rule for rule, _, _ in BROKEN}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "fp32"},
        {"dtype": "fp32", "moments": "bf16"},
        {"dtype": "bf16", "master_weights": "remainder", "moments": "bf16"},
        {"dtype": "fp64"},
        {"dtype": "fp16"},
        {"dtype": "fp16", "initial_loss_scale": 4.0, "loss_scale_window": 1},
        {"fp8": "current"},
        {"fp8": "rowwise", "fp8_bf16_first_layers": 1, "fp8_bf16_last_layers": 2},
    ],
)
def test_sound_config_passes(changes: dict[str, Any]) -> None:
    validate_precision(PrecisionConfig(**changes))


def test_layers_that_stay_in_bf16() -> None:
    config = PrecisionConfig(fp8="current", fp8_bf16_first_layers=1, fp8_bf16_last_layers=2)
    assert bf16_layers(config, 6) == {0, 4, 5}
    assert bf16_layers(config, 3) == {0, 1, 2}
    assert bf16_layers(config, 2) == {0, 1}
    assert bf16_layers(PrecisionConfig(fp8="rowwise"), 6) == set()
    assert bf16_layers(PrecisionConfig(), 2) == {0, 1}


MODEL = TransformerConfig(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    vocab_size=100,
    max_position_embeddings=128,
)


SYMMETRIC = ParallelConfig(tp=2, sequence_parallel=True, tp_overlap="symmetric_memory")


@pytest.mark.parametrize(
    ("precision", "model", "parallel", "tokens", "message"),
    [
        (
            {"fp8_bf16_first_layers": 2, "fp8_bf16_last_layers": 1},
            {},
            ParallelConfig(),
            64,
            "2 and .* 1 leave none of 3 layers",
        ),
        ({}, {"hidden_size": 72}, ParallelConfig(), 64, "--model.hidden-size is 72, but"),
        ({}, {"ffn_hidden_size": 104}, ParallelConfig(), 64, "over --parallel.tp is 104"),
        ({}, {}, ParallelConfig(tp=4), 64, "ffn-hidden-size over --parallel.tp is 24"),
        ({}, {"head_dim": 10}, ParallelConfig(), 64, "width of the query heads of one rank is 40"),
        (
            {},
            {"head_dim": 12, "num_query_groups": 1},
            ParallelConfig(),
            64,
            "width of the query, key and value heads of one rank is 72",
        ),
        ({}, {}, ParallelConfig(), 40, "number of tokens of one rank is 40"),
        ({}, {}, SYMMETRIC, 64, "symmetric_memory is not built for --precision.fp8 current"),
    ],
)
def test_what_fp8_cannot_multiply(
    precision: dict[str, Any],
    model: dict[str, Any],
    parallel: ParallelConfig,
    tokens: int,
    message: str,
) -> None:
    config = PrecisionConfig(fp8="current", **precision)
    changed = dataclasses.replace(MODEL, **model)
    with pytest.raises(ConfigError, match=message):
        validate_fp8(config, changed, parallel, tokens)
    validate_fp8(PrecisionConfig(), changed, parallel, tokens)


def test_what_fp8_can_multiply() -> None:
    config = PrecisionConfig(fp8="current", fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    validate_fp8(config, MODEL, parallel, 64)
