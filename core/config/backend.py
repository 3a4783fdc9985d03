"""What supplies a layer's parts, and what each choice can compute."""

from dataclasses import dataclass
from typing import Literal

from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.errors import ConfigError

Backend = Literal["local", "transformer_engine"]

FP8_RECIPES: dict[Backend, tuple[str, ...]] = {
    "local": ("current", "rowwise"),
    "transformer_engine": ("current", "delayed", "blockwise"),
}
"""The recipes of `--precision.fp8` that a backend has."""

SPLIT_SCHEDULES = ("zb_h1", "zbv")
"""Pipeline schedules that put weight gradients off."""


@dataclass(frozen=True)
class BackendUse:
    """A backend and what is asked of it."""

    backend: Backend
    precision: PrecisionConfig
    parallel: ParallelConfig
    device: str
    """cpu, cuda, or auto, of which nothing is known yet."""


def _backend_has_recipe(use: BackendUse) -> None:
    fp8, recipes = use.precision.fp8, FP8_RECIPES[use.backend]
    if fp8 != "none" and fp8 not in recipes:
        [other] = [name for name, has in FP8_RECIPES.items() if name != use.backend]
        raise ConfigError(
            f"--precision.fp8 {fp8} is a recipe of --backend {other}, and --backend {use.backend} "
            f"has {', '.join(recipes)}: change one of them"
        )


def _engine_computes_on_cuda(use: BackendUse) -> None:
    if use.backend == "transformer_engine" and use.device == "cpu":
        raise ConfigError(
            "--backend transformer_engine runs on NVIDIA GPUs alone, and this run computes on a "
            "CPU: use --backend local"
        )


def _engine_computes_in_16_bits(use: BackendUse) -> None:
    if use.backend == "transformer_engine" and use.precision.dtype not in ("bf16", "fp16"):
        raise ConfigError(
            f"--precision.dtype {use.precision.dtype} has no kernels in --backend "
            "transformer_engine: use bf16 or fp16, or --backend local"
        )


def _engine_fuses_norms(use: BackendUse) -> None:
    if use.backend == "transformer_engine" and "norm" in use.parallel.recompute.modules:
        raise ConfigError(
            "--parallel.recompute.modules norm does nothing with --backend transformer_engine, "
            "which computes a norm and the linear layer after it as one: leave it out"
        )


def _engine_keeps_fp8_weights(use: BackendUse) -> None:
    fp8, mode = use.precision.fp8, use.parallel.data_parallel
    if use.backend == "transformer_engine" and fp8 != "none" and mode == "fsdp2":
        raise ConfigError(
            f"--precision.fp8 {fp8} of --backend transformer_engine keeps FP8 copies of whole "
            "weights, which --parallel.data-parallel fsdp2 frees after every layer: use zero1, or "
            "leave fp8 out"
        )


BACKEND_RULES = (
    _backend_has_recipe,
    _engine_computes_on_cuda,
    _engine_computes_in_16_bits,
    _engine_fuses_norms,
    _engine_keeps_fp8_weights,
)


def validate_backend(use: BackendUse) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in BACKEND_RULES:
        rule(use)


def validate_fp8_sizes(
    config: TransformerConfig, tp: int, *, sequence_parallel: bool, tokens: int
) -> None:
    """Check that Transformer Engine's FP8 products exist for an architecture: both sides of every
    operand a multiple of 16.

    Args:
        config: architecture.
        tp: tensor parallel size.
        sequence_parallel: whether a rank has a part of the sequence between products.
        tokens: of a microbatch.

    Raises:
        ConfigError: a size is no such multiple.
    """
    head = config.kv_channels
    sizes = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size / tp": config.ffn_hidden_size // tp,
        "query width / tp": config.num_attention_heads * head // tp,
        "key width / tp": max(1, config.kv_heads // tp) * head,
        "tokens of a microbatch": tokens // (tp if sequence_parallel else 1),
    }
    for name, size in sizes.items():
        if size % 16:
            raise ConfigError(
                f"--precision.fp8 needs sizes that are multiples of 16, but {name} is {size}: "
                "change it, or leave fp8 out"
            )
