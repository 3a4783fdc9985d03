"""Products of tensor-parallel layers under sequence parallelism, with the communication of the
sequence before or after them.

Legend: t tokens of the whole sequence, n and m the widths of a product's input and result.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from core.config.parallel import TpOverlap
from core.layers.products import Factor, Products
from core.parallel.collectives import (
    reduce_scatter_first,
    start_all_gather_first,
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
    bias: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """`[n, m]`, of a layer that multiplies in the format of the activations."""
        weight: Tensor = self.weight
        return weight if self.gradient else weight.t()

    def __call__(self, x: Factor) -> Tensor:
        """`[t, n]` to `[t, m]`."""
        if self.gradient:
            return self.products.input_gradient(x, self.weight)
        return self.products.output(x, self.weight, self.bias)


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


class SymmetricMemory:
    """In torch's fused operations, which copy pieces between GPUs without a communicator's kernels.

    Only for products in the format of the activations. The multicast of NVLink is not used: torch
    does so only for gathers whose result is not asked for, and `ParallelContext` sees it turned
    off.
    """

    def of_gathered(self, part: Factor, product: Product, axis: Axis) -> tuple[Tensor, Factor]:
        """See `Overlap`."""
        (x,) = part.by_token
        whole, (y,) = _fused().fused_all_gather_matmul(
            x, [product.matrix], 0, _name(axis), return_A=True
        )
        return y if product.bias is None else y.add_(product.bias), Factor((whole,))

    def scattered(self, x: Factor, product: Product, axis: Axis) -> Tensor:
        """See `Overlap`."""
        (rows,) = x.by_token
        return _fused().fused_matmul_reduce_scatter(rows, product.matrix, "sum", 0, _name(axis))


def _fused() -> Any:
    import torch.distributed._symmetric_memory  # defines the operations

    return torch.ops.symm_mem


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name


OVERLAPS: dict[TpOverlap, Overlap] = {
    "none": OneAfterTheOther(),
    "symmetric_memory": SymmetricMemory(),
}


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
