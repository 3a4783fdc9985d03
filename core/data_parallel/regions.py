"""What the optimizer sees of data parallelism: flat regions of parameters that this rank updates.

Replicated, a region is a whole bucket on every rank; under ZeRO-1 (Rajbhandari et al., "ZeRO",
2020) it is this rank's part of one; under FSDP2 it is this rank's rows of one parameter. Norm,
update and checkpoint know regions only, so one of each serves all modes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.data_parallel.deferred import DeferredProducts
from core.parallel.context import Axis
from core.parallel.sharding import Box, BoxCopy, DeclaredParameter, ParamSharding

ALIGNMENT = 128
"""Every parameter starts at a multiple of this many elements: wide loads stay aligned in every
format."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box of a parameter's local tensor that lies in a flat region without gaps."""

    name: str
    """Global name of the parameter."""
    global_shape: tuple[int, ...]
    start: int
    """First element in the region."""
    end: int
    """First element of what follows; a gap before it is zero in every tensor of the region."""
    shape: tuple[int, ...]
    copies: tuple[BoxCopy, ...]
    """What the fragment holds of the global tensor; `local` counts from the fragment's first
    element. Elements in no copy are padding."""

    @property
    def numel(self) -> int:
        """Elements, without the gap that follows."""
        return math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        """The fragment in a flat tensor of the region."""
        return flat[self.start : self.start + self.numel].view(self.shape)


@dataclass(frozen=True)
class Region:
    """Flat tensors of one size; elements outside all fragments are zero."""

    values: Tensor
    """Parameters in the model's format: views of what the model computes with, or shards of it."""
    main_grad: Tensor
    """Gradient, complete once `DataParallel.finish` has returned: fp32, or fp64 for fp64
    parameters."""
    fragments: tuple[Fragment, ...]
    weight_decay: bool


class DataParallel(Protocol):
    """How gradients are summed over dp, and how updated parameters get back to all ranks.

    One step is `begin_step` before the first forward pass, `finish` after the last backward pass,
    then for every region an update and `publish`, and last `zero`.
    """

    parameters: dict[str, DeclaredParameter]
    """What this rank holds of the model, to be filled, saved and compared."""
    regions: Sequence[Region]
    """What this rank updates, in the order in which the next forward pass uses it."""
    deferred: DeferredProducts
    """Where products that make weight gradients are put off to."""
    counted: Axis
    """The ranks whose regions together hold every element of the model."""

    def begin_step(self, microbatches: int) -> None:
        """Say that a step starts, and of how many microbatches."""

    def finish(self) -> None:
        """Make the gradients of all regions the sum over dp; collective over dp."""

    def publish(self, index: int) -> None:
        """Bring the updated values of a region to whoever needs them; collective over dp, on all
        ranks in the same order.
        """

    def zero(self) -> None:
        """Make all gradients count as zero for the next step."""

    def wait_for_parameters(self) -> None:
        """Wait until all parameters are whole again, before they are read outside a forward pass
        (to save or compare them).
        """


def aligned(numel: int) -> int:
    """`numel` rounded up to the alignment of parameters."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def cut_fragments(
    sharding: ParamSharding, shape: Sequence[int], first: int, stop: int, start: int
) -> Iterator[Fragment]:
    """The fragments that elements `first` to `stop` of a local tensor, in row-major order, make up.

    Args:
        sharding: of the whole local tensor.
        shape: of the local tensor.
        first: first element of the run.
        stop: element after its last.
        start: where the run lies in the region.
    """
    ends_parameter = stop == math.prod(shape)
    for box in row_major_boxes(first, stop, tuple(shape)):
        end = start + box.numel
        last = end - start == stop - first
        copies = []
        for copy in sharding.copies:
            common = copy.local.intersect(box)
            if common is not None:
                moved = common.relative_to(copy.local).start
                place = tuple(g + m for g, m in zip(copy.global_.start, moved, strict=True))
                copies.append(BoxCopy(common.relative_to(box), Box(place, common.shape), copy.grad))
        yield Fragment(
            sharding.name,
            sharding.global_shape,
            start,
            aligned(end) if last and ends_parameter else end,
            box.shape,
            tuple(copies),
        )
        first, start = first + box.numel, end


def row_major_boxes(first: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The fewest boxes that elements `first` to `stop` of a tensor in row-major order make up, each
    without gaps in memory, in order.
    """
    if first >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = math.prod(shape[1:])
    row, last_row = first // inner, (stop - 1) // inner

    def part(index: int, begin: int, end: int) -> Iterator[Box]:
        for box in row_major_boxes(begin, end, shape[1:]):
            yield Box((index, *box.start), (1, *box.shape))

    if row == last_row and stop - first < inner:
        yield from part(row, first - row * inner, stop - row * inner)
        return
    if first % inner:
        yield from part(row, first - row * inner, inner)
        row += 1
    whole_rows = stop // inner - row
    if whole_rows:
        yield Box((row, *(0,) * (len(shape) - 1)), (whole_rows, *shape[1:]))
    if stop % inner:
        yield from part(last_row, 0, stop % inner)
