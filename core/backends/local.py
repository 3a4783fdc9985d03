"""The backend that needs only torch."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from core.backends.provider import NormKind
from core.layers.attention import CoreAttention
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.norm import LayerNorm, RMSNorm
from core.layers.products import Products
from core.spec import ModuleSpec


@dataclass(frozen=True)
class LocalSpecProvider:
    """This project's own layers over torch and the functions of `core.kernels`."""

    products: Products | None = None
    """How linear layers multiply; None: in the format of the activations."""
    plain_layers: frozenset[int] = frozenset()
    """Layers that multiply in the format of the activations all the same."""

    def for_layer(self, layer: int) -> "LocalSpecProvider":
        """One without `products` for the plain layers."""
        return LocalSpecProvider() if layer in self.plain_layers else self

    def column_parallel_linear(self) -> ModuleSpec[ColumnParallelLinear]:
        """Linear layer cut by output features."""
        return ModuleSpec(ColumnParallelLinear, self._recipe)

    def row_parallel_linear(self) -> ModuleSpec[RowParallelLinear]:
        """Linear layer cut by input features."""
        return ModuleSpec(RowParallelLinear, self._recipe)

    def norm(self, kind: NormKind) -> ModuleSpec[nn.Module]:
        """Norm over the last dimension."""
        norms: dict[NormKind, type[nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
        return ModuleSpec(norms[kind])

    def core_attention(self) -> ModuleSpec[CoreAttention]:
        """Attention without weights."""
        return ModuleSpec(CoreAttention)

    @property
    def _recipe(self) -> dict[str, Any]:
        return {} if self.products is None else {"products": self.products}
