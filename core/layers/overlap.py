"""Products of tensor-parallel layers under sequence parallelism, with the communication of the
sequence before or after them.

Legend: t tokens of the whole sequence, n and m the widths of a product's input and result.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from core.config.parallel import TpOverlap
from core.layers.products import Factor, Products
from core.parallel.collectives import (
    reduce_scatter_first,
    start_all_gather_first,
    start_broadcasts_first,
    start_reduce,
    wait,
)
from core.parallel.context import Axis


@dataclass(frozen=True)
class Product:
    """`x W^T + b`, or `dy W` for a gradient."""

    products: Products
    weight: Any
    """As `Products.weight` prepared it."""
    gradient: bool
    width: int
    """m."""
    dtype: torch.dtype
    """Of the result."""
    bias: Tensor | None = None

    def __call__(self, x: Factor, out: Tensor | None = None) -> Tensor:
        """`[t, n]` to `[t, m]`."""
        if self.gradient:
            return self.products.input_gradient(x, self.weight, out)
        return self.products.output(x, self.weight, self.bias, out)


class Overlap(Protocol):
    """What runs beside what. All ranks of the axis call the same."""

    def of_gathered(self, part: Factor, product: Product, axis: Axis) -> tuple[Tensor, Factor]:
        """The product `[t, m]` of all tokens, of which this rank has `[t / tp, n]`, and the
        tokens.
        """

    def scattered(self, x: Factor, product: Product, axis: Axis) -> Tensor:
        """This rank's part `[t / tp, m]` of the sum over the axis of a product of `[t, n]`."""


class OneAfterTheOther:
    """Gather, then multiply; multiply, then scatter."""

    def of_gathered(self, part: Factor, product: Product, axis: Axis) -> tuple[Tensor, Factor]:
        """See `Overlap`."""
        whole = gather(part, axis)
        return product(whole), whole

    def scattered(self, x: Factor, product: Product, axis: Axis) -> Tensor:
        """See `Overlap`."""
        return reduce_scatter_first(product(x), axis)


class Chunked:
    """In pieces, each the part of one rank: while a piece is multiplied, the next one is on its way
    from its owner (broadcast), or the last one to it (reduce).

    A rank multiplies its own part while the first piece comes. Pieces are neighbouring rows, so
    that the GEMMs write where the result belongs.
    """

    def of_gathered(self, part: Factor, product: Product, axis: Axis) -> tuple[Tensor, Factor]:
        """See `Overlap`."""
        started = [start_broadcasts_first(x, axis) for x in part.by_token]
        whole = Factor(tuple(x for x, _ in started), part.shared)
        y = _empty(product, whole)
        for rank in sorted(range(axis.size), key=lambda rank: rank != axis.rank):
            for _, works in started:
                if rank != axis.rank:
                    wait(works[rank])
            product(_piece(whole, rank, axis), _rows(y, rank, axis))
        for _, works in started:
            wait(works[axis.rank])
        return y, whole

    def scattered(self, x: Factor, product: Product, axis: Axis) -> Tensor:
        """See `Overlap`."""
        y, works = _empty(product, x), []
        for rank in range(axis.size):
            piece = product(_piece(x, rank, axis), _rows(y, rank, axis))
            works.append(start_reduce(piece, rank, axis))
        for work in works:
            wait(work)
        # A copy, or the other parts would stay in memory.
        return _rows(y, axis.rank, axis).clone()


OVERLAPS: dict[TpOverlap, Overlap] = {"none": OneAfterTheOther(), "chunked": Chunked()}


def start_gather(part: Factor, axis: Axis) -> tuple[Factor, list[dist.Work | None]]:
    """All tokens from the ranks that have some; to be read after the works."""
    started = [start_all_gather_first(x, axis) for x in part.by_token]
    return Factor(tuple(x for x, _ in started), part.shared), [work for _, work in started]


def gather(part: Factor, axis: Axis) -> Factor:
    """`start_gather`, waited for."""
    whole, works = start_gather(part, axis)
    for work in works:
        wait(work)
    return whole


def _empty(product: Product, x: Factor) -> Tensor:
    tokens = x.by_token[0]
    return torch.empty(tokens.shape[0], product.width, dtype=product.dtype, device=tokens.device)


def _rows(x: Tensor, rank: int, axis: Axis) -> Tensor:
    return x.chunk(axis.size)[rank]


def _piece(x: Factor, rank: int, axis: Axis) -> Factor:
    return Factor(tuple(_rows(tensor, rank, axis) for tensor in x.by_token), x.shared)
