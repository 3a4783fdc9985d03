"""The backend that needs only torch."""

from dataclasses import dataclass

from torch import nn

from core.backends.provider import NormKind
from core.layers.attention import CoreAttention
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.norm import LayerNorm, RMSNorm
from core.parallel.context import ParallelContext
from core.spec import ModuleSpec
from core.transformer.execution import Execution


@dataclass(frozen=True)
class LocalSpecProvider:
    """This project's own layers over torch and the functions of `core.kernels`."""

    def for_layer(self, layer: int) -> "LocalSpecProvider":
        """The same for every layer."""
        return self

    def column_parallel_linear(self) -> ModuleSpec[ColumnParallelLinear]:
        """Linear layer cut by output features."""
        return ModuleSpec(ColumnParallelLinear)

    def row_parallel_linear(self) -> ModuleSpec[RowParallelLinear]:
        """Linear layer cut by input features."""
        return ModuleSpec(RowParallelLinear)

    def norm(self, kind: NormKind) -> ModuleSpec[nn.Module]:
        """Norm over the last dimension."""
        norms: dict[NormKind, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
        return ModuleSpec(norms[kind])

    def core_attention(self) -> ModuleSpec[CoreAttention]:
        """Attention without weights."""
        return ModuleSpec(CoreAttention)

    def layernorm_column_parallel_linear(
        self, kind: NormKind, eps: float, norm: str
    ) -> ModuleSpec[nn.Module] | None:
        """None: compiled norms are as fast by themselves."""
        return None

    def execution(self, ctx: ParallelContext) -> Execution:
        """Nothing special."""
        return Execution()

    def describe(self) -> str:
        """The name."""
        return "backend: local"
