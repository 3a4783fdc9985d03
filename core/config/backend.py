"""What supplies a layer's parts, and what each choice can compute."""

from dataclasses import dataclass
from typing import Literal

from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
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


def _engine_communicates_by_itself(use: BackendUse) -> None:
    if use.backend == "transformer_engine" and use.parallel.tp_overlap != "none":
        raise ConfigError(
            f"--parallel.tp-overlap {use.parallel.tp_overlap} does nothing with --backend "
            "transformer_engine, whose layers communicate by themselves: leave it out"
        )


BACKEND_RULES = (
    _backend_has_recipe,
    _engine_computes_on_cuda,
    _engine_computes_in_16_bits,
    _engine_fuses_norms,
    _engine_keeps_fp8_weights,
    _engine_communicates_by_itself,
)


def validate_backend(use: BackendUse) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in BACKEND_RULES:
        rule(use)
