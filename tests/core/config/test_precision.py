import math
from typing import Any

import pytest

from core.config.precision import PRECISION_RULES, PrecisionConfig, validate_precision
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
    (
        "_fp8_completes_bf16",
        {"dtype": "fp16", "fp8": "current"},
        "--precision.fp8 current does not fit --precision.dtype fp16: use bf16",
    ),
    ("_fp8_completes_bf16", {"dtype": "fp32", "fp8": "delayed"}, "dtype fp32: use bf16"),
    (
        "_fp8_layers_do_something",
        {"fp8_bf16_first_layers": 1},
        "fp8-bf16-first-layers 1 does nothing without --precision.fp8",
    ),
    (
        "_fp8_layers_do_something",
        {"fp8_bf16_last_layers": 2},
        "fp8-bf16-last-layers 2 does nothing without",
    ),
    (
        "_fp8_layers_do_something",
        {"fp8": "current", "fp8_bf16_last_layers": -1},
        "fp8-bf16-last-layers is -1: it must be at least 0",
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
    ],
)
def test_sound_config_passes(changes: dict[str, Any]) -> None:
    validate_precision(PrecisionConfig(**changes))
