"""Triton kernels against the plain functions in fp64: on a CPU under Triton's interpreter, on a GPU
compiled."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels import cross_entropy
from core.kernels.cross_entropy import (
    VocabSlice,
    plain_row_statistics,
    plain_write_gradient,
    vocab_parallel_cross_entropy,
)
from core.parallel.context import Axis

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
"""Largest error of a gradient. The interpreter truncates to bf16 where the GPU rounds."""
POISON = 3e4


def _logits(tokens: int, columns: int, valid: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    logits = 5 * torch.randn(tokens, columns, generator=generator)
    # The maximum grows from block to block in one row, and falls in another.
    logits[0] += torch.arange(columns) / 50
    logits[-1] -= torch.arange(columns) / 50
    logits[:, valid:] = POISON
    return logits.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), [(1000, 997), (5000, 4100), (2048, 2048), (8, 0)])
def test_row_statistics(columns: int, valid: int, dtype: torch.dtype) -> None:
    from core.kernels.triton_cross_entropy import row_statistics

    logits = _logits(3, columns, valid, dtype)
    expected = plain_row_statistics(logits.double(), valid)
    found = row_statistics(logits, valid, True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found = row_statistics(logits, valid, False)
    torch.testing.assert_close(found[:, :2].double(), expected[:, :2], rtol=1e-5, atol=1e-5)
    assert not found[:, 2].any()


def test_row_statistics_of_a_part_of_wider_rows() -> None:
    from core.kernels.triton_cross_entropy import row_statistics

    wide = _logits(4, 96, 96, torch.float32)
    expected = plain_row_statistics(wide[:, 10:60], 50)
    torch.testing.assert_close(row_statistics(wide[:, 10:60], 50, True), expected)


def test_a_common_offset_costs_no_accuracy() -> None:
    """Sums of the logits themselves would be 3e8, of which fp32 keeps 32."""
    from core.kernels.triton_cross_entropy import row_statistics

    logits = _logits(2, 3000, 3000, torch.float32) + 1e5
    expected = plain_row_statistics(logits.double(), 3000)
    torch.testing.assert_close(
        row_statistics(logits, 3000, True).double(), expected, rtol=1e-5, atol=0
    )


def test_infinite_and_invalid_logits() -> None:
    from core.kernels.triton_cross_entropy import row_statistics

    logits = torch.zeros(3, 2100, device=DEVICE)
    logits[0, :2060] = -math.inf
    logits[1] = -math.inf
    logits[2, 5] = math.nan
    found = row_statistics(logits, 2100, False)
    assert found[0].tolist() == [0.0, 40.0, 0.0]
    assert found[1].tolist() == [-math.inf, 0.0, 0.0]
    assert found[2, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("columns", "valid"), [(1000, 997), (2100, 2060), (8, 0)])
def test_gradient(columns: int, valid: int, smoothing: float, dtype: torch.dtype) -> None:
    from core.kernels.triton_cross_entropy import write_gradient

    logits = _logits(4, columns, valid, dtype)
    # First and last token of this part, and tokens of the parts before and after it.
    labels = torch.tensor([100, 100 + max(valid - 1, 0), 99, 100 + columns], device=DEVICE)
    statistics = plain_row_statistics(logits.double(), max(valid, 1))
    statistics = torch.stack((statistics[:, 0], statistics[:, 1].log()), -1)
    scale = torch.tensor([1.0, -2.0, 0.5, 0.0], device=DEVICE)
    rest = (100, valid), (smoothing, smoothing / 5000)
    expected = logits.double()
    plain_write_gradient(expected, labels, statistics, scale.double(), *rest)
    version = logits._version
    write_gradient(logits, labels, statistics.float(), scale, *rest)
    assert logits._version > version
    assert not logits[:, valid:].any()
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cross_entropy, "has_triton_twin", lambda x: x.dtype != torch.float64)
    logits, labels = _logits(5, 1008, 1000, dtype), torch.tensor([0, 999, 3, 4, 5], device=DEVICE)
    part = VocabSlice(Axis("tp", 1, 0, (0,), None), 0, 1000, 1000)
    leaf = logits.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf * 1, labels, part, smoothing)
    losses.sum().backward()
    exact = logits[:, :1000].double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none", label_smoothing=smoothing)
    expected.sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(losses.detach().double(), expected.detach(), rtol=1e-5, atol=1e-5)
    tolerance = DTYPES[dtype]
    actual = leaf.grad[:, :1000].double()
    torch.testing.assert_close(actual, exact.grad, rtol=tolerance, atol=tolerance / 100)
