"""Collectives over one axis: plain ones, and those that autograd sees. Along an axis of one process
all of them are no operations.

The backward of the latter is the transpose of their forward (Shoeybi et al., "Megatron-LM", 2019;
under sequence parallelism Korthikanti et al., "Reducing activation recomputation", 2022). Linear
layers call the plain ones, since they hide them behind products.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.context import Axis

T = TypeVar("T")
_OnAxis = Callable[[Tensor, Axis], Tensor]

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


def all_gather_objects(mine: T, axis: Axis) -> list[T]:
    """An object of every rank of the axis, in rank order. Pickled: small things, seldom."""
    if axis.group is None:
        return [mine]
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, mine, group=axis.group)
    return found


# ---- With autograd -------------------------------------------------------------------------------


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, there: _OnAxis, back: _OnAxis) -> Tensor:
        ctx.axis, ctx.back = axis, back
        return there(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.axis), None, None, None


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum `x` over the axis, where all ranks then go on alike: an all-reduce; backward nothing."""

    def there(x: Tensor, axis: Axis) -> Tensor:
        # A copy: the caller's tensor may still be needed by its own backward.
        return all_reduce(x.contiguous().clone(), axis)

    def back(dy: Tensor, axis: Axis) -> Tensor:
        return dy

    return x if axis.size == 1 else _Collective.apply(x, axis, there, back)


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Sum `[s, ...]` over the axis and keep this rank's `[s / size, ...]`: a reduce-scatter;
    backward an all-gather.
    """
    if axis.size == 1:
        return x
    return _Collective.apply(x, axis, reduce_scatter_first, all_gather_first)


def gather_last(x: Tensor, axis: Axis) -> Tensor:
    """`[..., n]` to `[..., n * size]`, where all ranks then go on alike: an all-gather; backward
    this rank's part.
    """

    def there(x: Tensor, axis: Axis) -> Tensor:
        return torch.cat(all_gather_first(x, axis).chunk(axis.size), dim=-1)

    def back(dy: Tensor, axis: Axis) -> Tensor:
        return dy.chunk(axis.size, dim=-1)[axis.rank].contiguous()

    return x if axis.size == 1 else _Collective.apply(x, axis, there, back)
