"""What a backend supplies. Layer specs are written once against this; `local` needs only torch."""

from typing import Any, Literal, Protocol

from torch import nn

from core.parallel.context import ParallelContext
from core.spec import ModuleSpec
from core.transformer.execution import Execution

NormKind = Literal["rmsnorm", "layernorm"]


class BackendSpecProvider(Protocol):
    """Specs for the places in a layer. A spec's `params` hold what the backend itself decides, such
    as a recipe for low precision; its module is constructed as the class of `local` is.
    """

    def for_layer(self, layer: int) -> "BackendSpecProvider":
        """The provider for layer `layer`, counted over the whole model: backends may treat the
        first and last layers in another way.
        """

    def column_parallel_linear(self) -> ModuleSpec[Any]:
        """Linear layer cut by output features."""

    def row_parallel_linear(self) -> ModuleSpec[Any]:
        """Linear layer cut by input features."""

    def norm(self, kind: NormKind) -> ModuleSpec[nn.Module]:
        """Norm over the last dimension."""

    def layernorm_column_parallel_linear(
        self, kind: NormKind, eps: float, norm: str
    ) -> ModuleSpec[Any] | None:
        """A norm and the column-parallel linear layer after it as one module, or None where the
        backend computes them one after the other.

        Args:
            kind: of the norm.
            eps: added to the variance.
            norm: global name that the norm would have by itself, which its parameters keep.
        """

    def core_attention(self) -> ModuleSpec[Any]:
        """Attention without weights."""

    def execution(self, ctx: ParallelContext) -> Execution:
        """How a stack of this backend's layers is run."""

    def describe(self) -> str:
        """What the start of the log says of the backend."""
