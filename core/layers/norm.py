"""Norms over the last dimension. Their weights are whole on every rank; under sequence parallelism
each rank sees a part of the sequence, so their gradients are partial.
"""

from typing import ClassVar

from torch import Tensor, nn

from core.kernels.elementwise import add_norm, layer_norm, rms_norm
from core.parallel.cutting import whole_copy
from core.parallel.placement import Placement
from core.parallel.random import ONES, ZEROS, Init
from core.parallel.recompute import is_recomputed
from core.parallel.sharding import Declaration, GradKind

NormParameters = tuple[tuple[str, Init], ...]
"""Names and initial values."""


def declare_norm(
    module: nn.Module,
    place: Placement,
    parameters: NormParameters,
    size: int,
    *,
    per_head: bool = False,
    prefix: str = "",
    norm: str | None = None,
) -> None:
    """Declare the parameters of a norm on the module that computes it.

    Args:
        module: gets them.
        place: axes, format and device.
        parameters: of the norm.
        size: width of the last dimension.
        per_head: the input is this rank's own heads, so gradients are partial over tp at any rate.
        prefix: of their attributes.
        norm: global name of the norm, where it is not the module's.
    """
    shape = (size,)
    grad: GradKind = "partial" if per_head or place.ctx.sequence_parallel else "same"
    for name, init in parameters:
        global_name = None if norm is None else f"{norm}.{name}"
        copies = whole_copy(shape, grad)
        declaration = Declaration(shape, copies, init, weight_decay=False, global_name=global_name)
        place.declare(module, f"{prefix}{name}", shape, declaration)


class _Norm(nn.Module):
    PARAMETERS: ClassVar[NormParameters]
    weight: nn.Parameter
    bias: nn.Parameter | None

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
        self.eps = eps
        self.register_parameter("bias", None)
        declare_norm(self, place, self.PARAMETERS, size, per_head=per_head)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        extra: Tensor | None = None,
        fork: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`[..., h]` to the same shape; with `fork`, `x + branch + extra` (or `x`; `extra` is the
        bias of the branch) and the norm of that.
        """
        if fork:
            return add_norm(x, branch, extra, self.weight, self.bias, self.eps)
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    """Root mean square norm with a weight (Zhang & Sennrich, 2019)."""

    PARAMETERS = (("weight", ONES),)


class LayerNorm(_Norm):
    """Layer norm with weight and bias (Ba et al., 2016)."""

    PARAMETERS = (("weight", ONES), ("bias", ZEROS))


def takes_sum(norm: nn.Module) -> bool:
    """Whether `norm(hidden, branch, extra, True)` is right and worth while."""
    # Recompute would keep both summands for a norm that needs their sum alone.
    return isinstance(norm, _Norm) and not is_recomputed(norm)


def fork(norm: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states to go on with, and their norm. Where the norm can, the gradients of both meet
    in one pass over memory.
    """
    if isinstance(norm, _Norm):
        same, normed = norm(hidden, None, None, True)
        return same, normed
    return hidden, norm(hidden)
