"""Number formats of a run."""

import math
from dataclasses import dataclass
from typing import Literal

from core.config.parallel import ParallelConfig
from core.config.transformer import TransformerConfig
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
    """Multiply in 8-bit floating point in the layers' linear parts, E4M3 forward and E5M2 for
    gradients (blockwise: E4M3 alone), with scales from: current, the largest value of each matrix
    as it is; rowwise, of each row of it; delayed, those of the steps before; blockwise, of each
    block. --backend local has current and rowwise, transformer_engine all but rowwise."""
    fp8_bf16_first_layers: int = 0
    """fp8: layers at the start that stay in bf16."""
    fp8_bf16_last_layers: int = 0
    """fp8: layers at the end that stay in bf16."""
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


def _fp8_needs_bf16(config: PrecisionConfig) -> None:
    if config.fp8 != "none" and config.dtype != "bf16":
        raise ConfigError(
            f"--precision.fp8 {config.fp8} completes --precision.dtype bf16, not {config.dtype}: "
            "leave one of the two out"
        )


def _fp8_layers_do_something(config: PrecisionConfig) -> None:
    for name in ("fp8_bf16_first_layers", "fp8_bf16_last_layers"):
        value, option = getattr(config, name), name.replace("_", "-")
        if value < 0:
            raise ConfigError(f"--precision.{option} is {value}: it must be at least 0")
        if value and config.fp8 == "none":
            raise ConfigError(
                f"--precision.{option} {value} does nothing without --precision.fp8: leave it out, "
                "or choose an fp8 recipe"
            )


PRECISION_RULES = (
    _loss_scale_only_for_fp16,
    _loss_scale_can_work,
    _memory_formats_save_something,
    _fp8_needs_bf16,
    _fp8_layers_do_something,
)


def validate_precision(config: PrecisionConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in PRECISION_RULES:
        rule(config)


def bf16_layers(config: PrecisionConfig, num_layers: int) -> frozenset[int]:
    """Layers that do not multiply in FP8, of a model of so many."""
    if config.fp8 == "none":
        return frozenset(range(num_layers))
    first, last = config.fp8_bf16_first_layers, config.fp8_bf16_last_layers
    return frozenset(range(num_layers)) - frozenset(range(first, num_layers - last))


def validate_fp8(
    config: PrecisionConfig, model: TransformerConfig, parallel: ParallelConfig, tokens: int
) -> None:
    """Check that FP8 can multiply what a transformer needs: tensor cores take widths that are
    multiples of 16.

    Args:
        config: number formats.
        model: architecture.
        parallel: layout.
        tokens: of a microbatch.

    Raises:
        ConfigError: no layer is in FP8, a width does not fit, or the layout hides communication in
            a way that is built for bf16 only.
    """
    if config.fp8 == "none":
        return
    if len(bf16_layers(config, model.num_layers)) == model.num_layers:
        raise ConfigError(
            f"--precision.fp8-bf16-first-layers {config.fp8_bf16_first_layers} and "
            f"--precision.fp8-bf16-last-layers {config.fp8_bf16_last_layers} leave none of "
            f"{model.num_layers} layers in FP8: lower them, or leave --precision.fp8 out"
        )
    if parallel.tp_overlap == "symmetric_memory":
        raise ConfigError(
            "--parallel.tp-overlap symmetric_memory is not built for --precision.fp8 "
            f"{config.fp8}: leave one of the two out"
        )
    tp = parallel.tp
    heads = model.num_attention_heads // tp
    queries_and_keys = (heads + 2 * max(1, model.kv_heads // tp)) * model.kv_channels
    for what, size in (
        ("--model.hidden-size", model.hidden_size),
        ("--model.ffn-hidden-size over --parallel.tp", model.ffn_hidden_size // tp),
        ("the width of the query heads of one rank", heads * model.kv_channels),
        ("the width of the query, key and value heads of one rank", queries_and_keys),
        ("the number of tokens of one rank", tokens // (tp if parallel.sequence_parallel else 1)),
    ):
        if size % 16:
            raise ConfigError(
                f"{what} is {size}, but --precision.fp8 {config.fp8} needs a multiple of 16: "
                "change it, or leave fp8 out"
            )
