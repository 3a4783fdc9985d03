"""The random bits that bf16 moments are rounded with: which global tensor and index every element
of a region has, and keys for it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.data_parallel.regions import ALIGNMENT, Fragment, Region
from core.optim.rounding import round_stochastic
from core.parallel.random import make_key, philox
from core.parallel.sharding import BoxCopy


@dataclass(frozen=True)
class Rows:
    """Part of a region as a matrix; element `[i, j]` has index `first + i * stride + j` in the
    global tensor `name`.
    """

    start: int
    """First element in the region."""
    shape: tuple[int, int]
    name: str = ""
    first: int = 0
    stride: int = 0

    @property
    def stop(self) -> int:
        """Element of the region after the last."""
        return self.start + math.prod(self.shape)


def whole_rows(region: Region) -> list[Rows]:
    """All of a region, whatever the parameters' shapes are."""
    numel = len(region.values)
    width = math.gcd(numel, ALIGNMENT)
    return [Rows(0, (numel // width, width))]


def rows_by_index(region: Region) -> list[Rows]:
    """The elements of a region that belong to a global tensor, as few matrices as they make up."""
    return [
        rows
        for fragment in region.fragments
        for copy in fragment.copies
        for rows in _box_rows(fragment, copy)
    ]


def _box_rows(fragment: Fragment, copy: BoxCopy) -> Iterator[Rows]:
    local, whole, shape = copy.local, fragment.global_shape, fragment.shape
    # From dim `split` on, the box is one run of elements both in the region and in the global
    # tensor.
    split = len(shape) - 1
    while split > 0 and local.shape[split] == shape[split] == whole[split]:
        split -= 1
    run = math.prod(local.shape[max(split, 0) :])
    # The dimension before it makes rows of these runs where the region has no gaps between them.
    tall = split > 0 and local.shape[split:] == shape[split:]
    outer = local.shape[: split - 1] if tall else local.shape[: max(split, 0)]
    height = local.shape[split - 1] if tall else 1
    for index in itertools.product(*map(range, outer)):
        inside = (*index, *(0,) * (len(shape) - len(index)))
        start = fragment.start + _flat_index(local.start, inside, shape)
        first = _flat_index(copy.global_.start, inside, whole)
        if tall:
            yield Rows(start, (height, run), fragment.name, first, math.prod(whole[split:]))
        else:
            width = math.gcd(run, ALIGNMENT)
            yield Rows(start, (run // width, width), fragment.name, first, width)


def _flat_index(start: Sequence[int], inside: Sequence[int], shape: Sequence[int]) -> int:
    """Row-major index of `start + inside` in a tensor."""
    flat = 0
    for a, b, size in zip(start, inside, shape, strict=True):
        flat = flat * size + a + b
    return flat


class RoundingDraws:
    """Keys and indices for the random bits of stochastic rounding: a hash of (seed, applied step,
    global name, global index), so the same at every layout.
    """

    def __init__(self, rows: Sequence[Sequence[Rows]], device: torch.device, seed: int) -> None:
        self._offsets = [0, *itertools.accumulate(map(len, rows))]
        flat = [row for region in rows for row in region]
        keys = [make_key(seed, "rounding", row.name) for row in flat]
        table = [
            (key & 0xFFFFFFFF, key >> 32, row.first, row.stride)
            for key, row in zip(keys, flat, strict=True)
        ]
        self._table = torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 4)
        self._now = self._table

    def begin_step(self, step: Tensor) -> None:
        """Take new keys for the step counted by a 0-dim int64 tensor; the host does not wait."""
        low, high = philox((self._table[:, 0], self._table[:, 1]), step)
        self._now = torch.cat([torch.stack([low, high], 1), self._table[:, 2:]], 1)

    def place(self, region: int, number: int) -> Tensor:
        """int64 `[4]` for the rows of this number in a region: two words of a key, `first`,
        `stride`.
        """
        return self._now[self._offsets[region] + number]


def rounded_moments(exp_avg: Tensor, exp_avg_sq: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in bf16; one random word serves both."""
    low, high, first, stride = place.unbind()
    rows = torch.arange(exp_avg.shape[0], device=place.device)
    columns = torch.arange(exp_avg.shape[1], device=place.device)
    bits = philox((low, high), first + rows[:, None] * stride + columns)[0]
    return round_stochastic(exp_avg, bits), round_stochastic(exp_avg_sq, bits >> 16)
