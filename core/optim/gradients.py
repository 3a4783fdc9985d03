"""What becomes of gradients inside a model replica, once the sum over dp is done: a sum where each
holder of a box has a part, and the norm.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.data_parallel.regions import Fragment, Region
from core.kernels.reduction import sum_of_squares
from core.parallel.collectives import all_gather_objects, all_reduce
from core.parallel.context import Axis, ParallelContext
from core.parallel.sharding import Box, BoxCopy
from core.parallel.sharing import SharedBox, Sharing


class ReplicaGradients:
    """The gradients in this rank's regions as boxes of global tensors, ready once the sum over dp
    is.
    """

    def __init__(
        self, regions: Sequence[Region], counted: Axis, sharing: Sharing, ctx: ParallelContext
    ) -> None:
        """Find what of the regions is summed over sharing groups, and what is counted in the norm.

        Collective: one gather of boxes over the replica where it has several ranks.

        Args:
            regions: what this rank updates.
            counted: the ranks whose regions together hold every element; see `DataParallel`.
            sharing: who else holds what in the replica.
            ctx: the process axes.

        Raises:
            ValueError: ranks that share a partial gradient have cut it in different ways.
        """
        self._counted, self._device = counted, ctx.device
        self._owned: list[Tensor] = []
        boxes: dict[str, list[SharedBox]] = defaultdict(list)
        for box in sharing.boxes:
            boxes[box.name].append(box)
        partial: dict[tuple[tuple[int, ...], str], dict[tuple[str, Box], Tensor]] = defaultdict(
            dict
        )
        for region in regions:
            spans: list[tuple[int, int]] = []
            for fragment in region.fragments:
                for copy in fragment.copies:
                    shared = _holding(boxes[fragment.name], copy)
                    view = fragment.view(region.main_grad)[copy.local.slices]
                    if copy.grad == "partial" and len(shared.ranks) > 1:
                        key = (shared.ranks, str(view.dtype))
                        partial[key][fragment.name, copy.global_] = view
                    if not sharing.owns(shared):
                        continue
                    span = _flat_span(fragment, copy.local)
                    if span is None:
                        self._owned.append(view)
                    elif spans and spans[-1][1] == span[0]:
                        spans[-1] = (spans[-1][0], span[1])
                    else:
                        spans.append(span)
            self._owned += [region.main_grad[start:stop] for start, stop in spans]
        # Holders may have their boxes in different places: names and boxes give one order to all.
        self._partial = [
            (sharing.groups[key[0]], [views[box] for box in sorted(views)])
            for key, views in sorted(partial.items(), key=lambda item: item[0])
        ]
        _check_cuts({key: sorted(views) for key, views in partial.items()}, ctx.model)

    def reduce_partial(self) -> None:
        """Sum the boxes of which each holder has a part, in place in `main_grad`.

        Collective over sharing groups: one all-reduce for each group and format. To be called after
        the sum over dp.
        """
        for group, views in self._partial:
            flat = torch.cat([view.reshape(-1) for view in views])
            dist.all_reduce(flat, group=group)
            pieces = flat.split([view.numel() for view in views])
            shaped = [p.view(view.shape) for p, view in zip(pieces, views, strict=True)]
            torch._foreach_copy_(views, shaped)

    def norm(self) -> Tensor:
        """Global norm of the gradient, each element of each global parameter counted once.

        Collective: one all-reduce over the replica, or over the world where regions are cut over
        dp. Squares are summed in fp64. The host does not wait.

        Returns:
            0-dim fp64 tensor, the same on all these ranks.
        """
        total = sum_of_squares(self._owned).to(self._device)
        return all_reduce(total, self._counted).sqrt()


def _holding(boxes: Iterable[SharedBox], copy: BoxCopy) -> SharedBox:
    """The shared box that a part of it lies in."""
    return next(box for box in boxes if box.copy.global_.intersect(copy.global_) == copy.global_)


def _check_cuts(mine: Mapping[tuple[tuple[int, ...], str], Any], axis: Axis) -> None:
    """Summing boxes of different cuts would mix gradients of different elements."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for cuts in all_gather_objects(mine, axis):
        for key, boxes in cuts.items():
            found[key].append(boxes)
    for (ranks, _), several in found.items():
        if len(several) != len(ranks) or any(boxes != several[0] for boxes in several):
            raise ValueError(
                f"ranks {ranks} share gradients of which each has a part, but hold them cut in "
                "different ways: give the shared parameters buckets of their own"
            )


def _flat_span(fragment: Fragment, local: Box) -> tuple[int, int] | None:
    """Where a box of a fragment lies in the region if it is contiguous there, the gap after it
    included where it ends the fragment, so that neighbours join.
    """
    split = next((d for d, n in enumerate(local.shape) if n > 1), len(local.shape))
    if local.shape[split + 1 :] != fragment.shape[split + 1 :]:
        return None
    first = 0
    for start, size in zip(local.start, fragment.shape, strict=True):
        first = first * size + start
    stop = first + local.numel
    ends = stop == fragment.numel
    return fragment.start + first, fragment.end if ends else fragment.start + stop
