"""Norms over the last dimension. Their weights are whole on every rank; under sequence parallelism
each rank sees a part of the sequence, so their gradients are partial.
"""

from typing import ClassVar

from torch import Tensor, nn

from core.kernels.elementwise import add_rms_norm, layer_norm, rms_norm
from core.parallel.placement import Placement
from core.parallel.random import ONES, ZEROS, Init
from core.parallel.recompute import is_recomputed
from core.parallel.sharding import Declaration, GradKind, declare_parameter, whole_copy


class _Norm(nn.Module):
    PARAMETERS: ClassVar[tuple[tuple[str, Init], ...]]

    def __init__(self, place: Placement, size: int, eps: float, *, per_head: bool = False) -> None:
        """Make the parameters.

        Args:
            place: axes, format and device.
            size: width of the last dimension.
            eps: added to the variance.
            per_head: the input is this rank's own heads, so gradients are partial over tp at any
                rate.
        """
        super().__init__()
        self.eps, shape = eps, (size,)
        grad: GradKind = "partial" if per_head or place.ctx.sequence_parallel else "same"
        for name, init in self.PARAMETERS:
            declare_parameter(
                self,
                name,
                shape,
                Declaration(shape, whole_copy(shape, grad), init, weight_decay=False),
                dtype=place.dtype,
                device=place.device,
            )


class RMSNorm(_Norm):
    """Root mean square norm with a weight (Zhang & Sennrich, 2019)."""

    PARAMETERS = (("weight", ONES),)
    weight: nn.Parameter

    def forward(
        self, x: Tensor, branch: Tensor | None = None, fork: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`[..., h]` to the same shape; with `fork`, `x + branch` (or `x`) and the norm of that."""
        if fork:
            return add_rms_norm(x, branch, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(_Norm):
    """Layer norm with weight and bias (Ba et al., 2016)."""

    PARAMETERS = (("weight", ONES), ("bias", ZEROS))
    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to the same shape."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def takes_sum(norm: nn.Module) -> bool:
    """Whether `norm(hidden, branch, True)` is right and worth while."""
    # Recompute would keep both summands for a norm that needs their sum alone.
    return isinstance(norm, RMSNorm) and not is_recomputed(norm)


def fork(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states to go on with, and their norm. Where the norm can, the gradients of both meet
    in one pass over memory.
    """
    if isinstance(norm, RMSNorm):
        same, normed = norm(hidden, None, True)
        return same, normed
    return hidden, norm(hidden)
