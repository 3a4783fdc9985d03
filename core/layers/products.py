"""The three products of a linear layer, `x W^T`, `dy W` and `dy^T x`, and the communication of a
sequence that is cut, before or after them.

Legend: t tokens, n width of an input or of its gradient, i input width, o output width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from core.data_parallel.main_grad import accumulate_product
from core.parallel.collectives import reduce_scatter_first, start_all_gather_first, wait
from core.parallel.context import Axis

Cut = Literal["alike", "rows", "columns"]
"""How a matrix lies over an axis: the same on all ranks, or each has some of its rows (tokens, or
the output features of a weight) or of its columns (features, or the input features of a weight)."""


@dataclass(frozen=True)
class Factor:
    """A matrix of tokens `[t, n]` as a product takes it: itself, or in FP8 with scales."""

    by_token: tuple[Tensor, ...]
    """With a row for each token: where tokens are cut, the whole is gathered from these."""
    shared: tuple[Tensor, ...] = ()
    """The same on all ranks."""


class Products:
    """How a linear layer multiplies: in the format of the activations, unless a subclass says
    otherwise (`fp8_products.py`).
    """

    def check(self, device: torch.device) -> None:
        """See that a device can do it.

        Raises:
            ConfigError: it cannot.
        """

    def factors(
        self, x: Tensor, cut: Cut, axis: Axis, *, gradient: bool, both: bool
    ) -> tuple[Factor, Factor]:
        """Prepare this rank's `[t, n]` of a matrix.

        Args:
            x: contiguous.
            cut: how the matrix lies over the axis. Of rows that are cut the products need all: the
                caller gathers them from the factor.
            axis: the tensor-parallel axis.
            gradient: whether it is the gradient of an output, not an input.
            both: whether the gradient of the weight is wanted.

        Returns:
            The factor for the product that sums over n, and, if `both`, that for the gradient of
            the weight, which sums over t. They may be one object, as here.
        """
        factor = Factor((x,))
        return factor, factor

    def weight(self, weight: nn.Parameter, cut: Cut, axis: Axis) -> Any:
        """Prepare this rank's part of a weight `[o, i]`, for `output` and `input_gradient`."""
        return weight

    def output(self, x: Factor, weight: Any, bias: Tensor | None) -> Tensor:
        """`x W^T + b` `[t, o]`."""
        (rows,) = x.by_token
        return F.linear(rows, weight, bias)

    def input_gradient(self, dy: Factor, weight: Any) -> Tensor:
        """`dy W` `[t, i]`."""
        (rows,) = dy.by_token
        return torch.mm(rows, weight)

    def weight_gradient(self, weight: nn.Parameter, dy: Factor, x: Factor) -> Tensor | None:
        """Add `dy^T x` to the gradient of the weight; see `accumulate_product`."""
        return accumulate_product(weight, *dy.by_token, *x.by_token)


PLAIN = Products()


@dataclass(frozen=True)
class Product:
    """One of those two that read a weight: `x W^T + b`, or `dy W` for a gradient."""

    products: Products
    weight: Any
    """As `Products.weight` prepared it."""
    gradient: bool
    bias: Tensor | None = None

    def __call__(self, x: Factor) -> Tensor:
        """`[t, n]` to `[t, m]`, m the width of the result."""
        if self.gradient:
            return self.products.input_gradient(x, self.weight)
        return self.products.output(x, self.weight, self.bias)


class OneAfterTheOther:
    """Gather, then multiply; multiply, then scatter. `overlap.py` does both at once. All ranks of
    the axis call the same.
    """

    def of_gathered(self, part: Factor, product: Product, axis: Axis) -> tuple[Tensor, Factor]:
        """The product `[t, m]` of all tokens, of which this rank has `[t / tp, n]`, and the
        tokens.
        """
        whole = gather(part, axis)
        return product(whole), whole

    def scattered(self, x: Factor, product: Product, axis: Axis) -> Tensor:
        """This rank's part `[t / tp, m]` of the sum over the axis of a product of `[t, n]`."""
        return reduce_scatter_first(product(x), axis)


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
