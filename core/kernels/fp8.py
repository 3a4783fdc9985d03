"""Matrices of 8-bit floating-point numbers and their products (Micikevicius et al., "FP8 formats
for deep learning", 2022).

The value of an element is `data * scale`, and scales follow from the matrix as it is now ("current
scaling"): the largest magnitude of the whole matrix, of a row or of a column becomes the largest
number of the format. Legend: m rows, n columns, k what a product sums over.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.kernels.compile import compiled, upcast

E4M3 = torch.float8_e4m3fn
"""Four bits of exponent, up to 448: activations and weights."""
E5M2 = torch.float8_e5m2
"""Five bits of exponent, up to 57344: gradients."""

TINY = torch.finfo(torch.float32).tiny
"""The least scale. Its reciprocal is finite, so that zeros stay zeros."""


@dataclass(frozen=True)
class Fp8Matrix:
    """A matrix `[m, n]`, row by row."""

    data: Tensor
    """`[m, n]` in E4M3 or E5M2."""
    scale: Tensor
    """fp32: `[1, 1]`, one for each row `[m, 1]`, or one for each column `[1, n]`."""


@compiled
def scale_of_whole(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale `[1, 1]` of a matrix. NaN and infinity give NaN and infinity."""
    # By row first: how a reduction of everything is cut into pieces the compiler decides by the
    # sizes that it sees first. After small matrices this took 11 ms for large ones in place of 0.1.
    return _scale(x.abs().amax(1).amax().view(1, 1), dtype)


@compiled
def scales_of_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale for each row `[m, 1]`."""
    return _scale(x.abs().amax(1, keepdim=True), dtype)


@compiled
def scales_of_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale for each column `[1, n]`."""
    return _scale(x.abs().amax(0, keepdim=True), dtype)


def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return (largest.float() / torch.finfo(dtype).max).clamp(min=TINY)


@compiled
def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x / scale`, rounded to the nearest number of the format.

    A matrix with an infinity has an infinite scale, and then all that is finite becomes 0 and the
    infinity NaN: what is multiplied by the scale later is not a number anywhere.

    Args:
        x: `[m, n]`.
        scale: see `Fp8Matrix`.
        dtype: E4M3 or E5M2.
    """
    limit = torch.finfo(dtype).max
    # The quotient may pass the limit by a rounding error.
    return (upcast(x) * scale.reciprocal()).clamp(-limit, limit).to(dtype)


def quantize_both(
    x: Tensor, scale: Tensor, flipped_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`quantize` of a matrix and of its transpose, each row by row, reading it once on CUDA.

    Args:
        x: `[m, n]`.
        scale: `[1, 1]` or `[m, 1]`, of the first result.
        flipped_scale: `[1, 1]` or `[n, 1]`, of the second.
        dtype: E4M3 or E5M2.

    Returns:
        `[m, n]` and `[n, m]`.
    """
    if x.is_cuda:
        from core.kernels import triton_fp8

        return triton_fp8.quantize_both(x, scale, flipped_scale, dtype)
    return quantize(x, scale, dtype), quantize(x, flipped_scale.t(), dtype).t().contiguous()


def flip(x: Fp8Matrix) -> Fp8Matrix:
    """The transpose `[n, m]`, row by row; no element changes."""
    if x.data.is_cuda:
        from core.kernels import triton_fp8

        return Fp8Matrix(triton_fp8.transpose(x.data), x.scale.t())
    return Fp8Matrix(x.data.t().contiguous(), x.scale.t())


def dequantize(x: Fp8Matrix, dtype: torch.dtype) -> Tensor:
    """The values, in a wide format."""
    return x.data.to(dtype) * x.scale.to(dtype)


def scaled_product(
    a: Fp8Matrix,
    b: Fp8Matrix,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`a b^T + bias` in `dtype`: tensor cores on CUDA; on a CPU a product of the dequantised
    matrices in at least fp32.

    On CUDA n and k must be multiples of 16, one of the two matrices E4M3, and with scales by row
    `dtype` bf16.

    Args:
        a: `[m, k]`, scaled as a whole or by row.
        b: `[n, k]`, scaled like `a`.
        dtype: format of the result.
        bias: `[n]`.
        fast: add up with fewer bits. Good enough for outputs, not for gradients (what Transformer
            Engine does too).
        out: where to put the result, contiguous.

    Returns:
        `[m, n]`.
    """
    if a.data.is_cuda:
        # cuBLAS wants the first factor row by row and the second column by column.
        product: Tensor = torch._scaled_mm(
            a.data,
            b.data.t(),
            scale_a=a.scale,
            scale_b=b.scale.t(),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=fast,
            **({} if out is None else {"out": out}),
        )
        return product
    wide = torch.promote_types(dtype, torch.float32)
    product = dequantize(a, wide) @ dequantize(b, wide).t()
    if bias is not None:
        product += bias
    return product.to(dtype) if out is None else out.copy_(product)


def add_scaled_product(total: Tensor, a: Fp8Matrix, b: Fp8Matrix, dtype: torch.dtype) -> None:
    """Add `a b^T` to a matrix: inside the product where `core/kernels/cublaslt.py` can, else it is
    rounded to `dtype` and then added.

    Args:
        total: `[m, n]`.
        a: `[m, k]`, see `scaled_product`.
        b: `[n, k]`.
        dtype: format of the product.
    """
    if total.is_cuda:
        from core.kernels import cublaslt

        if cublaslt.add_product(total, a, b):
            return
    add_rounded(total, scaled_product(a, b, dtype))


@compiled
def add_rounded(total: Tensor, x: Tensor) -> None:
    """Add a matrix of a narrower format."""
    total.add_(x)
