"""Collectives that autograd sees, over one axis. Along an axis of one process all of them are no
operations.

Each function's backward is the transpose of its forward (Shoeybi et al., "Megatron-LM", 2019; for
the sequence-parallel ones Korthikanti et al., "Reducing activation recomputation", 2022):

    function           forward         backward
    copy_to            identity        all-reduce
    reduce_from        all-reduce      identity
    gather_last        all-gather -1   own slice
    scatter_last       own slice       all-gather -1
    gather_sequence    all-gather 0    reduce-scatter 0, or own slice where all ranks go on alike
    reduce_scatter_sequence   reduce-scatter 0    all-gather 0
    scatter_sequence   own slice 0     all-gather 0
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.context import Axis

# ---- Plain collectives on one axis ---------------------------------------------------------------


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Sum (or `op`) of `x` over the axis, in place."""
    if axis.group is not None:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


# torch 2.13 renamed the two collectives on single tensors and warns of the old names.
_gather: Callable[..., dist.Work | None] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)
_reduce_scatter: Callable[..., dist.Work | None] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)


def start_all_gather_first(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work | None]:
    """`all_gather_first` on the communicator's own stream: read the result after `wait`."""
    if axis.group is None:
        return x, None
    out = x.new_empty((x.shape[0] * axis.size, *x.shape[1:]))
    work = _gather(_bytes(out), _bytes(x.contiguous()), group=axis.group, async_op=True)
    return out, work


def _bytes(x: Tensor) -> Tensor:
    """What a communicator copies where it does not know the format."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def start_reduce_scatter_first(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work | None]:
    """`reduce_scatter_first` on the communicator's own stream: read the result after `wait`."""
    if axis.group is None:
        return x, None
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, _reduce_scatter(out, x.contiguous(), group=axis.group, async_op=True)


def start_all_reduce(x: Tensor, axis: Axis) -> dist.Work | None:
    """Sum of `x` over the axis, in place, on the communicator's own stream."""
    if axis.group is None:
        return None
    return dist.all_reduce(x, group=axis.group, async_op=True)


def wait(work: dist.Work | None) -> None:
    """Make the current stream (on a CPU, the caller) wait for a collective that was started."""
    if work is not None:
        work.wait()


def start_all_gather_in_place(whole: Tensor, axis: Axis) -> dist.Work:
    """Fill a flat tensor from the parts that the ranks of an axis of several have at their place;
    read it after `wait`.
    """
    work = _gather(whole, own_part(whole, axis), group=axis.group, async_op=True)
    assert work is not None
    return work


def start_reduce_scatter_in_place(whole: Tensor, axis: Axis) -> dist.Work:
    """Sum a flat tensor over an axis of several ranks into each rank's own part of it; read that
    after `wait`. What the other parts hold is not specified.
    """
    work = _reduce_scatter(own_part(whole, axis), whole, group=axis.group, async_op=True)
    assert work is not None
    return work


def own_part(whole: Tensor, axis: Axis) -> Tensor:
    """This rank's part of a tensor that is cut evenly along its first dimension."""
    size = whole.shape[0] // axis.size
    return whole[axis.rank * size : (axis.rank + 1) * size]


def all_gather_first(x: Tensor, axis: Axis) -> Tensor:
    """`[n, ...]` of every rank to `[n * size, ...]`, in rank order."""
    out, work = start_all_gather_first(x, axis)
    wait(work)
    return out


def reduce_scatter_first(x: Tensor, axis: Axis) -> Tensor:
    """Sum of `[n, ...]` over the axis, each rank keeping its `[n / size, ...]` part."""
    out, work = start_reduce_scatter_first(x, axis)
    wait(work)
    return out


def own_slice(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part of a dimension, contiguous."""
    return x.chunk(axis.size, dim=dim)[axis.rank].contiguous()


def _all_gather_last(x: Tensor, axis: Axis) -> Tensor:
    return torch.cat(all_gather_first(x, axis).chunk(axis.size), dim=-1)


# ---- With autograd -------------------------------------------------------------------------------


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].contiguous().clone(), ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        # A copy: the caller's tensor may still be needed by its own backward.
        return all_reduce(x.contiguous().clone(), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather_last(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return own_slice(grads[0], ctx.axis, -1), None


class _ScatterLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return own_slice(x, axis, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather_last(grads[0], ctx.axis), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, same_gradients: bool) -> Tensor:
        ctx.axis, ctx.same = axis, same_gradients
        return all_gather_first(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.same:
            return own_slice(grads[0], ctx.axis, 0), None, None
        return reduce_scatter_first(grads[0], ctx.axis), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_first(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_first(grads[0], ctx.axis), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return own_slice(x, axis, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_first(grads[0], ctx.axis), None


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Enter a region where each rank computes a part of a layer; gradients are summed on the way
    back.
    """
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Leave such a region: sum the parts."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """`[..., n]` to `[..., n * size]`, where all ranks then go on alike."""
    return x if axis.size == 1 else _GatherLast.apply(x, axis)


def scatter_last(x: Tensor, axis: Axis) -> Tensor:
    """`[..., n]`, alike on all ranks, to this rank's `[..., n / size]`."""
    return x if axis.size == 1 else _ScatterLast.apply(x, axis)


def gather_sequence(x: Tensor, axis: Axis, *, same_gradients: bool = False) -> Tensor:
    """`[s / size, ...]` to `[s, ...]`.

    Args:
        x: this rank's part of the sequence.
        axis: the tensor-parallel axis.
        same_gradients: whether what follows is the same computation on all ranks, so that each has
            the whole gradient already; otherwise each has a part and the parts are summed.
    """
    return x if axis.size == 1 else _GatherSequence.apply(x, axis, same_gradients)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Sum `[s, ...]` over the axis and keep this rank's `[s / size, ...]`."""
    return x if axis.size == 1 else _ReduceScatterSequence.apply(x, axis)


def scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """`[s, ...]`, alike on all ranks, to this rank's `[s / size, ...]`."""
    return x if axis.size == 1 else _ScatterSequence.apply(x, axis)
