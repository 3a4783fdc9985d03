"""The products of a linear layer in FP8.

Legend: t tokens, n width of an input or of its gradient, i input width, o output width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.data_parallel.derived import derived
from core.data_parallel.main_grad import accumulate_gradient
from core.errors import ConfigError
from core.kernels import cublaslt
from core.kernels.fp8 import (
    E4M3,
    E5M2,
    Fp8Matrix,
    add_scaled_product,
    flip,
    quantize,
    quantize_both,
    scale_of_whole,
    scaled_product,
    scales_of_columns,
    scales_of_rows,
)
from core.kernels.maxima import maxima_of
from core.layers.products import Cut, Factor, Products
from core.parallel.collectives import all_reduce
from core.parallel.context import Axis


@dataclass(frozen=True)
class Fp8Weight:
    """A weight for both products that read it."""

    rows: Fp8Matrix
    """`[o, i]`."""
    flipped: Fp8Matrix
    """`[i, o]`."""
    dtype: torch.dtype
    """Of activations."""


@dataclass(frozen=True)
class Fp8Products(Products):
    """Products of FP8 matrices with current scaling: E4M3, gradients E5M2; results in the format of
    the activations.

    Every matrix is quantised once and kept so for the backward pass, a weight once a step. One
    scale for a whole matrix is the fastest. With one for each row a matrix is quantised twice, by
    token and by feature, since a scale can be taken out of a sum only if all its terms have it.

    Scales are those of the whole matrix, not of this rank's part: its maxima are taken over the
    axis (all-reduce of one number, or of one for each row or column that is cut). So every tp
    rounds the same, and quantised tokens can be gathered, in half of the bytes. The exception are
    gradients of key heads that several ranks hold, each of which has a part of them.

    The gradient of a weight is added in fp32 inside the GEMM. With scales by row it leaves the GEMM
    in the weight's format and is added then: rounding once to bf16 is little beside what E5M2 has
    rounded before, and fp32 would take a third more traffic.
    """

    by_row: bool = False

    def check(self, device: torch.device) -> None:
        """Every CPU can (slowly), and GPUs from compute capability 8.9 on. How these add weight
        gradients is decided here, and said in the log if it is not inside the product.
        """
        if device.type != "cuda":
            return
        if torch.cuda.get_device_capability(device) < (8, 9):
            major, minor = torch.cuda.get_device_capability(device)
            raise ConfigError(
                f"--precision.fp8 needs a GPU of compute capability 8.9 or more, but "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}: leave it out"
            )
        if not self.by_row:
            cublaslt.adder(device)

    def factors(
        self, x: Tensor, cut: Cut, axis: Axis, *, gradient: bool, both: bool
    ) -> tuple[Factor, Factor]:
        """Quantise. Transposed here, unless the tokens are yet to be gathered.

        Collective over the axis unless `cut` is alike: one or two all-reduces.
        """
        dtype = E5M2 if gradient else E4M3
        scale = self._scale(x, cut, axis, dtype, by_column=False)
        if not both:
            by_token = self._by_token(quantize(x, scale, dtype), scale)
            return by_token, by_token
        other = self._scale(x, cut, axis, dtype, by_column=True) if self.by_row else scale
        if cut == "rows":
            data = quantize(x, scale, dtype)
            by_token = self._by_token(data, scale)
            if not self.by_row:
                return by_token, by_token
            return by_token, Factor((quantize(x, other, dtype),), (other,))
        data, flipped = quantize_both(x, scale, other.t(), dtype)
        return self._by_token(data, scale), Factor((), (flipped, other.t()))

    def weight(self, weight: nn.Parameter, cut: Cut, axis: Axis) -> Fp8Weight:
        """Quantise, once a step. Collective over the axis."""

        def make() -> Fp8Weight:
            values = weight.detach()
            scale = self._scale(values, cut, axis, E4M3, by_column=False)
            other = scale
            if self.by_row:
                other = self._scale(values, cut, axis, E4M3, by_column=True)
            data, flipped = quantize_both(values, scale, other.t(), E4M3)
            return Fp8Weight(Fp8Matrix(data, scale), Fp8Matrix(flipped, other.t()), weight.dtype)

        return derived(weight, make)

    def output(self, x: Factor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        """See `Products`."""
        rows = _matrix(x)
        return scaled_product(rows, weight.rows, weight.dtype, bias=bias, fast=True)

    def input_gradient(self, dy: Factor, weight: Fp8Weight) -> Tensor:
        """See `Products`."""
        return scaled_product(_matrix(dy), weight.flipped, weight.dtype)

    def weight_gradient(self, weight: nn.Parameter, dy: Factor, x: Factor) -> Tensor | None:
        """See `Products`."""
        first, second = _flipped(dy), _flipped(x)

        def product(out: Tensor | None) -> Tensor:
            # With scales by row the product leaves in bf16 alone.
            if out is None or self.by_row:
                gradient = scaled_product(first, second, weight.dtype)
                return gradient if out is None else out.copy_(gradient)
            return scaled_product(first, second, out.dtype, out=out)

        def add(total: Tensor) -> None:
            add_scaled_product(total, first, second, weight.dtype)

        return accumulate_gradient(weight, product, add)

    def _scale(
        self, x: Tensor, cut: Cut, axis: Axis, dtype: torch.dtype, *, by_column: bool
    ) -> Tensor:
        """`[1, 1]`, or `[m, 1]` or `[1, n]`, of the whole matrix. The scale of the largest of
        several matrices is the largest of their scales.
        """
        if not self.by_row:
            scale, spread = scale_of_whole(maxima_of(x), dtype), cut != "alike"
        elif by_column:
            scale, spread = scales_of_columns(x, dtype), cut == "rows"
        else:
            scale, spread = scales_of_rows(x, dtype), cut == "columns"
        return all_reduce(scale, axis, dist.ReduceOp.MAX) if spread else scale

    def _by_token(self, data: Tensor, scale: Tensor) -> Factor:
        return Factor((data, scale)) if self.by_row else Factor((data,), (scale,))


def _matrix(factor: Factor) -> Fp8Matrix:
    return Fp8Matrix(*factor.by_token, *factor.shared)


def _flipped(factor: Factor) -> Fp8Matrix:
    """`[n, t]`: as it has been quantised, or, gathered since then, transposed now."""
    return flip(_matrix(factor)) if factor.by_token else _matrix(factor)
