"""How parameters and gradients lie in buckets: contiguous storage that is reduced, gathered and cut
over dp as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.data_parallel.regions import ALIGNMENT, aligned
from core.parallel.sharding import DeclaredParameter, ParamSharding


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in a bucket."""

    sharding: ParamSharding
    shape: tuple[int, ...]
    """Local shape."""
    start: int
    """First element in the bucket's flat tensors."""
    numel: int
    """Elements of the parameter, without the gap that follows."""

    @property
    def end(self) -> int:
        """First element of the slot that follows; the gap before it is zero in every tensor."""
        return aligned(self.start + self.numel)

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's part of a flat tensor of the bucket, in the parameter's local shape."""
        return flat[self.start : self.start + self.numel].view(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters that share one storage, one gradient buffer and one reduction."""

    slots: tuple[Slot, ...]
    values: Tensor
    """The parameters themselves, flat; `parameter.data` is a view of it."""
    main_grad: Tensor
    """Flat gradient: fp32, or fp64 for fp64 parameters."""
    weight_decay: bool


def plan_buckets(parameters: dict[str, DeclaredParameter], limit: int) -> list[list[str]]:
    """Names per bucket: one format and one kind of weight decay, `limit` elements unless one
    parameter is larger. What other stages hold too is alone.
    """
    done: list[list[str]] = []
    open_: dict[tuple[torch.dtype, torch.device, bool], tuple[list[str], int]] = {}
    for name, declared in reversed(parameters.items()):
        parameter = declared.parameter
        if declared.across_stages:
            done.append([name])
            continue
        key = (parameter.dtype, parameter.device, declared.weight_decay)
        names, size = open_.get(key, ([], 0))
        numel = aligned(parameter.numel())
        if names and size + numel > limit:
            done.append(names)
            names, size = [], 0
        open_[key] = ([*names, name], size + numel)
    return done + [names for names, _ in open_.values()]


def make_bucket(parameters: Sequence[DeclaredParameter], parts: int) -> Bucket:
    """Allocate a bucket that can be cut into as many aligned parts, and move the parameters into
    it. Its length is the same whether or not it is cut, so that modes can be compared bit by bit.
    """
    slots: list[Slot] = []
    for declared in parameters:
        data = declared.parameter.data
        start = slots[-1].end if slots else 0
        slots.append(Slot(declared.sharding, tuple(data.shape), start, data.numel()))
    first = parameters[0].parameter
    size = -(-slots[-1].end // (ALIGNMENT * parts)) * ALIGNMENT * parts
    values = torch.zeros(size, dtype=first.dtype, device=first.device)
    wide = torch.promote_types(first.dtype, torch.float32)
    main_grad = torch.zeros(size, dtype=wide, device=first.device)
    for declared, slot in zip(parameters, slots, strict=True):
        view = slot.view(values)
        view.copy_(declared.parameter.data)
        declared.parameter.data = view
    return Bucket(tuple(slots), values, main_grad, parameters[0].weight_decay)
