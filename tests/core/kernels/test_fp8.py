"""FP8 matrices and products against fp64 twins."""

import pytest
import torch
from torch import Tensor

from core.kernels.fp8 import (
    E4M3,
    E5M2,
    TINY,
    Fp8Matrix,
    add_scaled_product,
    dequantize,
    flip,
    quantize,
    quantize_both,
    scale_of_whole,
    scaled_product,
    scales_of_columns,
    scales_of_rows,
)

FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes over many binades, so that subnormal numbers of the formats are met."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.logspace(-6, 1, shape[-1], dtype=torch.float64)).to(dtype)


def _nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a format, halves to the even code, by looking at all of them."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).double()
    finite = values.isfinite() & (codes != 128)  # without -0
    codes, values = codes[finite], values[finite]
    distance = (x.double()[..., None] - values).abs()
    distance += (codes % 2) * 1e-30  # a half goes to the even one
    return values[distance.argmin(-1)]


@FORMATS
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32, torch.float64])
def test_largest_becomes_the_largest_of_the_format(dtype: torch.dtype, wide: torch.dtype) -> None:
    x = _random(32, 48, dtype=wide)
    limit = torch.finfo(dtype).max
    scales = scale_of_whole(x, dtype), scales_of_rows(x, dtype), scales_of_columns(x, dtype)
    assert [tuple(scale.shape) for scale in scales] == [(1, 1), (32, 1), (1, 48)]
    for scale, dims in zip(scales, ((0, 1), (1,), (0,)), strict=True):
        assert scale.dtype == torch.float32
        torch.testing.assert_close(
            scale.double(), x.double().abs().amax(dims, keepdim=True) / limit, rtol=1e-7, atol=0
        )
        largest = quantize(x, scale, dtype).float().abs().amax(dims)
        assert bool((largest == limit).all())


@FORMATS
def test_rounds_to_nearest(dtype: torch.dtype) -> None:
    x = _random(32, 48)
    scale = scale_of_whole(x, dtype)
    assert torch.equal(quantize(x, scale, dtype).double(), _nearest(x * scale.reciprocal(), dtype))
    halves = torch.tensor(
        [[17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]]
    )  # between E4M3's 16, 18, 20
    if dtype == E4M3:
        found = quantize(halves, torch.ones(1, 1), dtype).float()
        assert found.tolist() == [[16.0, 20.0, -16.0, 0.0, 2.0**-8]]


@FORMATS
def test_zeros_and_tiny_values(dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 16)
    scale = scale_of_whole(zeros, dtype)
    assert scale.item() == TINY
    assert not bool(quantize(zeros, scale, dtype).float().any())
    tiny = torch.full((4, 16), 1e-39)  # what no scale can bring up
    assert bool(quantize(tiny, scale_of_whole(tiny, dtype), dtype).float().isfinite().all())


@FORMATS
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_reaches_the_product(dtype: torch.dtype, bad: float) -> None:
    x = _random(16, 32)
    x[3, 5] = bad
    scale = scale_of_whole(x, dtype)
    matrix = Fp8Matrix(quantize(x, scale, dtype), scale)
    other = _random(16, 32, seed=1)
    weight = Fp8Matrix(quantize(other, torch.ones(1, 1), E4M3), torch.ones(1, 1))
    assert not bool(scaled_product(matrix, weight, torch.bfloat16).isfinite().any())


@pytest.mark.parametrize("by_row", [False, True])
def test_quantize_both_is_quantize_of_the_matrix_and_of_its_transpose(by_row: bool) -> None:
    x = _random(32, 48)
    scale = scales_of_rows(x, E4M3) if by_row else scale_of_whole(x, E4M3)
    other = scales_of_rows(x.t(), E4M3) if by_row else scale
    data, flipped = quantize_both(x, scale, other, E4M3)
    assert flipped.is_contiguous()
    assert torch.equal(data.float(), quantize(x, scale, E4M3).float())
    assert torch.equal(flipped.float(), quantize(x.t(), other, E4M3).float())
    matrix = Fp8Matrix(data, scale)
    again = flip(matrix)
    assert again.data.is_contiguous()
    assert torch.equal(dequantize(again, torch.float32), dequantize(matrix, torch.float32).t())


def _matrix(x: Tensor, dtype: torch.dtype, by_row: bool) -> Fp8Matrix:
    scale = scales_of_rows(x, dtype) if by_row else scale_of_whole(x, dtype)
    return Fp8Matrix(quantize(x, scale, dtype), scale)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_product_of_dequantised_matrices(by_row: bool, biased: bool) -> None:
    a = _matrix(_random(32, 64), E5M2, by_row)
    b = _matrix(_random(48, 64, seed=1), E4M3, by_row)
    bias = torch.randn(48) if biased else None
    exact = (a.data.double() @ b.data.double().t()) * a.scale.double() * b.scale.double().t()
    exact = exact if bias is None else exact + bias
    assert torch.equal(scaled_product(a, b, torch.float64, bias=bias), exact) or torch.allclose(
        scaled_product(a, b, torch.float64, bias=bias), exact, rtol=1e-12
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = scaled_product(a, b, dtype, bias=bias)
        assert found.dtype == dtype
        assert (found - exact).norm() < tolerance * exact.norm()
        out = torch.empty(32, 48, dtype=dtype)
        assert scaled_product(a, b, dtype, bias=bias, out=out) is out
        assert torch.equal(out, found)


def test_product_is_that_of_torch() -> None:
    a, b = _matrix(_random(32, 64), E5M2, False), _matrix(_random(48, 64, seed=1), E4M3, False)
    theirs = torch._scaled_mm(
        a.data, b.data.t(), scale_a=a.scale, scale_b=b.scale.t(), out_dtype=torch.float32
    )
    torch.testing.assert_close(scaled_product(a, b, torch.float32), theirs)


@pytest.mark.parametrize("by_row", [False, True])
def test_products_are_added(by_row: bool) -> None:
    def matrix(rows: int, dtype: torch.dtype) -> Fp8Matrix:
        x = _random(rows, 48, seed=rows)
        scale = scales_of_rows(x, dtype) if by_row else scale_of_whole(x, dtype)
        return Fp8Matrix(quantize(x, scale, dtype), scale)

    a, b = matrix(32, E5M2), matrix(16, E4M3)
    total = _random(32, 16, dtype=torch.float64)
    expected = total + dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()
    add_scaled_product(total, a, b, torch.float64)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
