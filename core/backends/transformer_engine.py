"""The backend of NVIDIA's Transformer Engine: its linear layers, norms and attention, in 16 bits or
FP8. Embedding, head, rotary embedding, activation and loss stay the project's own, as do grouped
linear layers.

The package is imported where a part is made, so that this file can be read anywhere.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.backends.provider import NormKind
from core.errors import ConfigError
from core.layers.transformer_engine import (
    EngineColumnParallelLinear,
    EngineCoreAttention,
    EngineLayerNorm,
    EngineNormColumnParallelLinear,
    EngineOptions,
    EngineRMSNorm,
    EngineRowParallelLinear,
    FusedNorm,
    Recipe,
    fp8_region,
)
from core.parallel.context import ParallelContext
from core.spec import ModuleSpec
from core.transformer.execution import Execution


def require_transformer_engine() -> None:
    """Check that the package is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            "--backend transformer_engine needs the package of that name, which is not installed: "
            "`pip install 'tessera-zoo[te]'`, or use --backend local"
        )


@dataclass(frozen=True)
class TransformerEngineSpecProvider:
    """Parts by Transformer Engine."""

    num_layers: int
    fp8: Recipe = "none"
    bf16_first_layers: int = 0
    """Layers at the start that stay in 16 bits in an FP8 run."""
    bf16_last_layers: int = 0
    """Likewise at the end."""
    split_backward: bool = False
    """Whether the pipeline schedule puts weight gradients off."""
    layer: int | None = None
    """Which layer the parts are for."""

    def for_layer(self, layer: int) -> "TransformerEngineSpecProvider":
        """The provider for one layer, counted over the whole model."""
        return dataclasses.replace(self, layer=layer)

    def column_parallel_linear(self) -> ModuleSpec[EngineColumnParallelLinear]:
        """Linear layer cut by output features."""
        return ModuleSpec(EngineColumnParallelLinear, params={"options": self._options()})

    def row_parallel_linear(self) -> ModuleSpec[EngineRowParallelLinear]:
        """Linear layer cut by input features."""
        return ModuleSpec(EngineRowParallelLinear, params={"options": self._options()})

    def norm(self, kind: NormKind) -> ModuleSpec[nn.Module]:
        """Norm over the last dimension."""
        norms: dict[NormKind, type[nn.Module]] = {
            "rmsnorm": EngineRMSNorm,
            "layernorm": EngineLayerNorm,
        }
        return ModuleSpec(norms[kind])

    def layernorm_column_parallel_linear(
        self, kind: NormKind, eps: float, norm: str
    ) -> ModuleSpec[EngineNormColumnParallelLinear]:
        """A norm and the linear layer after it as one: in FP8 the norm's output is quantised where
        it is made.
        """
        params = {"norm": FusedNorm(kind, eps, norm), "options": self._options()}
        return ModuleSpec(EngineNormColumnParallelLinear, params=params)

    def core_attention(self) -> ModuleSpec[EngineCoreAttention]:
        """Attention without weights."""
        return ModuleSpec(EngineCoreAttention)

    def execution(self, ctx: ParallelContext) -> Execution:
        """In FP8, a region around every forward pass, and Transformer Engine's own recompute, which
        repeats a forward pass with the scales that it had.
        """
        if self.fp8 == "none":
            return Execution()

        def around() -> AbstractContextManager[object]:
            return fp8_region(self.fp8, ctx)

        return Execution(around, _recomputed)

    def describe(self) -> str:
        """Version and recipe."""
        import transformer_engine

        recipe = "" if self.fp8 == "none" else f", FP8 with {self.fp8} scaling"
        return f"backend: transformer_engine {transformer_engine.__version__}{recipe}"

    def _options(self) -> EngineOptions:
        stays = self.layer is None or not (
            self.bf16_first_layers <= self.layer < self.num_layers - self.bf16_last_layers
        )
        return EngineOptions(
            fp8="none" if stays else self.fp8,
            among_fp8=stays and self.fp8 != "none",
            split_backward=self.split_backward,
        )


def _recomputed(fn: Callable[..., Any], *args: Any) -> Any:
    import transformer_engine.pytorch as te

    return te.checkpoint(fn, *args, use_reentrant=False)
