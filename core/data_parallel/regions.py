"""What the optimizer sees of data parallelism: flat regions of parameters that this rank updates.

Replicated, a region is a whole bucket on every rank; under ZeRO-1 (Rajbhandari et al., "ZeRO",
2020) it is this rank's part of one; under FSDP2 it is this rank's rows of one parameter. Norm,
update and checkpoint know regions only, so one of each serves all modes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from core.data_parallel.deferred import DeferredProducts
from core.parallel.context import Axis
from core.parallel.sharding import BoxCopy, DeclaredParameter

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
