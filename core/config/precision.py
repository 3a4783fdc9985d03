"""Number formats of a run."""

import math
from dataclasses import dataclass
from typing import Literal

from core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Compute in `dtype`; gradients, master weights and moments are fp32 (fp64 for fp64) unless
    said otherwise.
    """

    dtype: Literal["fp32", "bf16", "fp16", "fp64"] = "bf16"
    """Format of parameters and activations. fp64 is for proving layouts equal."""
    master_weights: Literal["full", "remainder"] = "full"
    """full: an fp32 copy of every parameter. remainder: only the 16 bits that a bf16 parameter
    lacks of it, which saves 2 bytes a parameter and changes no bit of the result."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Format of Adam's two moments. bf16 is rounded stochastically and saves 4 bytes a
    parameter."""
    fp8: Literal["none", "current", "rowwise", "delayed", "blockwise"] = "none"
    """Compute the products of linear layers in 8 bits, e4m3 forward and e5m2 for gradients, scaled
    by tensor (current: by its own largest value; delayed: by those of steps before), by row, or by
    block (blockwise, e4m3 alone). Parameters keep `dtype`."""
    fp8_bf16_first_layers: int = 0
    """Layers at the start of the model that stay in bf16 all the same."""
    fp8_bf16_last_layers: int = 0
    """Likewise at its end."""
    initial_loss_scale: float = 2.0**16
    """fp16: loss scale at the start."""
    loss_scale_window: int = 1000
    """fp16: steps without overflow after which the loss scale is doubled."""
    loss_scale_hysteresis: int = 2
    """fp16: overflows tolerated before the loss scale is halved."""
    min_loss_scale: float = 1.0
    """fp16: the loss scale never falls below this."""


def _loss_scale_only_for_fp16(config: PrecisionConfig) -> None:
    names = (
        "initial_loss_scale",
        "loss_scale_window",
        "loss_scale_hysteresis",
        "min_loss_scale",
    )
    given = [n for n in names if getattr(config, n) != getattr(PrecisionConfig, n)]
    if config.dtype != "fp16" and given:
        raise ConfigError(
            f"loss scale options do nothing with --precision.dtype {config.dtype}: leave them out "
            "or use fp16"
        )


def _loss_scale_can_work(config: PrecisionConfig) -> None:
    for name in ("loss_scale_window", "loss_scale_hysteresis"):
        if getattr(config, name) < 1:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--precision.{option} is {getattr(config, name)}: it must be at least 1"
            )
    if not 0 < config.min_loss_scale <= config.initial_loss_scale < math.inf:
        raise ConfigError(
            f"--precision.min-loss-scale is {config.min_loss_scale} and "
            f"--precision.initial-loss-scale {config.initial_loss_scale}: they must be above 0 and "
            "finite, and the first not above the second"
        )


def _memory_formats_save_something(config: PrecisionConfig) -> None:
    if config.master_weights == "remainder" and config.dtype != "bf16":
        raise ConfigError(
            f"--precision.master-weights remainder completes bf16 parameters, those of "
            f"--precision.dtype {config.dtype} have another format: leave it out or use bf16"
        )
    if config.moments == "bf16" and config.dtype == "fp64":
        raise ConfigError(
            "--precision.moments bf16 does not fit --precision.dtype fp64, which is for proofs: "
            "leave it out"
        )


def _fp8_completes_bf16(config: PrecisionConfig) -> None:
    if config.fp8 != "none" and config.dtype != "bf16":
        raise ConfigError(
            f"--precision.fp8 {config.fp8} does not fit --precision.dtype {config.dtype}: use bf16"
        )


def _fp8_layers_do_something(config: PrecisionConfig) -> None:
    for name in ("fp8_bf16_first_layers", "fp8_bf16_last_layers"):
        value, option = getattr(config, name), f"--precision.{name.replace('_', '-')}"
        if value < 0:
            raise ConfigError(f"{option} is {value}: it must be at least 0")
        if value and config.fp8 == "none":
            raise ConfigError(
                f"{option} {value} does nothing without --precision.fp8: leave it out"
            )


PRECISION_RULES = (
    _loss_scale_only_for_fp16,
    _loss_scale_can_work,
    _memory_formats_save_something,
    _fp8_completes_bf16,
    _fp8_layers_do_something,
)


def validate_precision(config: PrecisionConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in PRECISION_RULES:
        rule(config)
