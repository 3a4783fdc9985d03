"""Sharing groups: who holds what of a model replica.

Ranks that hold the same box of a parameter form its sharing group; the lowest is its owner.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from core.parallel.collectives import all_gather_objects
from core.parallel.context import ParallelContext
from core.parallel.sharding import Box, BoxCopy, DeclaredParameter, GradKind, local_boxes


@dataclass(frozen=True, slots=True)
class SharedBox:
    """One box that this rank holds, and who else in its replica does."""

    name: str
    """Global name of the parameter."""
    copy: BoxCopy
    ranks: tuple[int, ...]
    """Global ranks of this replica that hold the box, in order, this one included."""

    @property
    def owner(self) -> int:
        """The rank that counts and saves the box."""
        return self.ranks[0]


@dataclass(frozen=True)
class Sharing:
    """The sharing groups of this rank's boxes."""

    rank: int
    """This rank in the world."""
    boxes: tuple[SharedBox, ...]
    """All boxes of this rank, in the order of `local_boxes`."""
    elements: int
    """Of all parameters of the model, each counted once."""
    groups: Mapping[tuple[int, ...], dist.ProcessGroup]
    """A process group for every set of ranks that shares a partial gradient."""

    def owns(self, box: SharedBox) -> bool:
        """Whether this rank is the owner."""
        return box.owner == self.rank


def publish_sharing(parameters: dict[str, DeclaredParameter], ctx: ParallelContext) -> Sharing:
    """Find out who holds what; called once, when the model is built.

    Collective: one gather of names and boxes over a replica, one of rank sets over the world, and
    the creation of groups for partial gradients.

    Raises:
        ValueError: the boxes of a parameter do not cover it exactly, or its holders declare
            different gradient kinds.
    """
    mine = [
        (declared.sharding.name, declared.sharding.global_shape, copy.global_, copy.grad)
        for declared, copy in local_boxes(parameters)
    ]
    holders: dict[tuple[str, Box], list[int]] = defaultdict(list)
    kinds: dict[tuple[str, Box], GradKind] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, published in zip(ctx.model.ranks, all_gather_objects(mine, ctx.model), strict=True):
        for name, shape, box, kind in published:
            holders[name, box].append(rank)
            if (
                kinds.setdefault((name, box), kind) != kind
                or shapes.setdefault(name, shape) != shape
            ):
                raise ValueError(f"{name}: its holders disagree on its shape or gradient kind")
    _check_cover(shapes, holders)
    boxes = tuple(
        SharedBox(
            declared.sharding.name, copy, tuple(holders[declared.sharding.name, copy.global_])
        )
        for declared, copy in local_boxes(parameters)
    )
    # Groups are made by all processes together, for every replica in one list.
    partial = {tuple(holders[key]) for key, kind in kinds.items() if kind == "partial"}
    everywhere = set().union(*all_gather_objects(partial, ctx.world))
    groups = ctx.new_groups(sorted(everywhere))
    rank = ctx.model.ranks[ctx.model.rank]
    own = {ranks: group for ranks, group in groups.items() if rank in ranks and group is not None}
    return Sharing(rank, boxes, sum(map(math.prod, shapes.values())), own)


def _check_cover(shapes: dict[str, tuple[int, ...]], holders: Iterable[tuple[str, Box]]) -> None:
    """Overlapping boxes would be counted twice, and a hole never trained."""
    covered = dict.fromkeys(shapes, 0)
    for name, box in holders:
        covered[name] += box.numel
    for name, numel in covered.items():
        if numel != math.prod(shapes[name]):
            raise ValueError(
                f"{name}: the boxes of all ranks have {numel} elements together, but the tensor "
                f"{shapes[name]} has {math.prod(shapes[name])}"
            )
