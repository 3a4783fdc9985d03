"""FP8 products that the real cuBLASLt adds to fp32 matrices, against dequantised matrices, and the
weight gradients that are made with them."""

import ctypes
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.data_parallel.deferred import DeferredProducts
from core.data_parallel.main_grad import expire
from core.kernels import cublaslt
from core.kernels.cublaslt import Adder, CublasLt, CublasLtError, loaded_library
from core.kernels.fp8 import (
    E4M3,
    E5M2,
    Fp8Matrix,
    add_rounded,
    add_scaled_product,
    dequantize,
    quantize,
    scale_of_whole,
    scaled_product,
)
from core.layers.fp8_products import Fp8Products
from core.parallel.context import Axis

pytestmark = pytest.mark.gpu

ONE = Axis("tp", 1, 0, (0,), None)
SHAPES = [
    (6144, 4096, 8192),
    (4096, 4096, 8192),
    (28672, 4096, 8192),
    (4096, 14336, 8192),
    (80, 272, 48),
    (16, 16, 16),
]
"""Rows and columns of a weight and tokens: Llama-3-8B, and small ones."""
BORDER = 64
TOLERANCE = 2e-3
"""Of a product's norm: tensor cores add numbers of 8 bits up with fewer than 24."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def _matrix(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Fp8Matrix:
    x = _random(rows, columns, seed=seed) * (seed + 1)
    scale = scale_of_whole(x, dtype)
    return Fp8Matrix(quantize(x, scale, dtype), scale)


def _exact(a: Fp8Matrix, b: Fp8Matrix) -> Tensor:
    return dequantize(a, torch.float64) @ dequantize(b, torch.float64).t()


def _in_bucket(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A flat buffer of fp32, and a matrix within it."""
    flat = torch.randn(rows * columns + 2 * BORDER, device="cuda")
    return flat, flat[BORDER:-BORDER].view(rows, columns)


def _error(found: Tensor, exact: Tensor, product: Tensor) -> float:
    return ((found.double() - exact).norm() / product.norm()).item()


def test_the_library_is_used() -> None:
    assert cublaslt.adder(torch.device("cuda")) is not None
    assert cublaslt.adder(torch.device("cuda")) is cublaslt.adder(torch.device("cuda", 0))


@pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E4M3), (E4M3, E5M2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_added(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    o, i, t = shape
    flat, total = _in_bucket(o, i)
    before = flat.clone()
    for seed in range(2):  # with other scales the second time
        a, b = _matrix(o, t, dtypes[0], seed), _matrix(i, t, dtypes[1], seed + 2)
        product = _exact(a, b)
        expected, apart = total.double() + product, total.clone()
        assert cublaslt.add_product(total, a, b)
        assert _error(total, expected, product) < TOLERANCE
        # What torch does, but for the order of a sum.
        apart += scaled_product(a, b, torch.float32)
        assert _error(total, apart.double(), product) < TOLERANCE
    # With what the first of a step does: nothing is read.
    total.fill_(torch.nan)
    scaled_product(a, b, torch.float32, out=total)
    assert _error(total, product, product) < TOLERANCE
    assert cublaslt.add_product(total, a, b)
    assert _error(total, 2 * product, product) < TOLERANCE
    for border in (slice(None, BORDER), slice(-BORDER, None)):
        assert torch.equal(flat[border], before[border])


def test_adding_inside_is_nearer_than_rounding_first() -> None:
    a, b = _matrix(512, 1024, E5M2, 0), _matrix(768, 1024, E4M3, 1)
    exact = _exact(a, b)
    inside, outside = (torch.zeros(512, 768, device="cuda") for _ in range(2))
    add_scaled_product(inside, a, b, torch.bfloat16)
    add_rounded(outside, scaled_product(a, b, torch.bfloat16))
    assert _error(inside, exact, exact) < _error(outside, exact, exact)


@pytest.mark.parametrize("offset", [4, 8, 16, 1, 2])
def test_alignment(offset: int, caplog: pytest.LogCaptureFixture) -> None:
    """16 bytes are enough; with fewer the product is rounded and added."""
    o, i, t = 128, 256, 512
    flat = torch.randn(o * i + 64, device="cuda")
    total = flat[offset : offset + o * i].view(o, i)
    before = flat.clone()
    a, b = _matrix(o, t, E5M2, 0), _matrix(i, t, E4M3, 1)
    product = _exact(a, b)
    expected = total.double() + product
    with caplog.at_level(logging.WARNING):
        add_scaled_product(total, a, b, torch.bfloat16)
    assert _error(total, expected, product) < 1e-2
    assert torch.equal(flat[:offset], before[:offset])
    assert torch.equal(flat[offset + o * i :], before[offset + o * i :])
    said = [r.getMessage() for r in caplog.records if "is added after it is made" in r.getMessage()]
    assert bool(said) == (offset < 4), said


def test_a_failing_call_raises() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    broken = Adder(CublasLt(loaded_library()), device)
    broken._handle = ctypes.c_void_p()
    a, b = _matrix(64, 64, E5M2, 0), _matrix(64, 64, E4M3, 1)
    with pytest.raises(CublasLtError, match=r"^cublasLtMatmulAlgoGetHeuristic .* status \d+$"):
        broken.add(torch.zeros(64, 64, device="cuda"), a, b)


def test_what_is_not_finite_reaches_the_sum() -> None:
    a, b = _matrix(64, 64, E5M2, 0), _matrix(64, 64, E4M3, 1)
    nan = Fp8Matrix(a.data, torch.full_like(a.scale, torch.nan))
    total = torch.zeros(64, 64, device="cuda")
    assert cublaslt.add_product(total, nan, b)
    assert not bool(total.isfinite().any())


def test_another_stream() -> None:
    a, b = _matrix(512, 2048, E5M2, 0), _matrix(768, 2048, E4M3, 1)
    total = torch.zeros(512, 768, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            assert cublaslt.add_product(total, a, b)
    torch.cuda.current_stream().wait_stream(side)
    product = 4 * _exact(a, b)
    assert _error(total, product, product) < TOLERANCE


@pytest.mark.parametrize("put_off", [False, True])
def test_weight_gradients_of_a_step(put_off: bool) -> None:
    """The first of a step overwrites, the others add, also when they are put off."""
    o, i, t = 768, 512, 1024
    weight: Any = nn.Parameter(torch.zeros(o, i, device="cuda", dtype=torch.bfloat16))
    flat, weight.main_grad = _in_bucket(o, i)
    weight.main_grad.zero_()
    weight.grad_ready = lambda: None
    products, deferred = Fp8Products(), DeferredProducts()
    for _ in range(2):
        expected = torch.zeros(o, i, device="cuda", dtype=torch.float64)
        later = []
        for microbatch in range(3):
            dy, x = _random(t, o, seed=microbatch), _random(t, i, seed=microbatch + 9)
            kinds: Any = {"cut": "alike", "axis": ONE, "both": True}
            _, dy_kept = products.factors(dy, gradient=True, **kinds)
            _, x_kept = products.factors(x, gradient=False, **kinds)
            a, b = (Fp8Matrix(*f.by_token, *f.shared) for f in (dy_kept, x_kept))
            expected += _exact(a, b)
            with deferred.collect() as collected:

                def product(dy: Any = dy_kept, x: Any = x_kept) -> None:
                    assert products.weight_gradient(weight, dy, x) is None

                if not (put_off and deferred.take(product)):
                    product()
            later += collected
        for compute in later:
            compute()
        assert _error(weight.main_grad, expected, expected) < TOLERANCE
        expire(weight)
        weight.main_grad.fill_(torch.nan)
    assert bool(flat[:BORDER].isfinite().all())


def test_adding_never_waits_for_the_device() -> None:
    a, b = _matrix(512, 1024, E5M2, 0), _matrix(768, 1024, E4M3, 1)
    total = torch.zeros(512, 768, device="cuda")
    assert cublaslt.add_product(total, a, b)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert cublaslt.add_product(total, a, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
