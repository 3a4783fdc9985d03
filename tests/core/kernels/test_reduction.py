import math

import pytest
import torch
from torch import Tensor

from core.kernels.reduction import plain_sum_of_squares, sum_of_squares

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _parts(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(70, 50, generator=generator, dtype=torch.float64)
    shapes = [(1,), (17_000,), (0,), (3, 5, 7), (33_000,)]
    parts = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(DEVICE, dtype) for x in (*parts, wide)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sum_of_squares(dtype: torch.dtype) -> None:
    parts = _parts(dtype)
    parts[-1] = parts[-1][:, 3:20]
    expected = math.fsum(x**2 for part in parts for x in part.double().flatten().tolist())
    found = sum_of_squares(parts)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-13)


def test_of_nothing() -> None:
    assert float(sum_of_squares([])) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_triton(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from core.kernels.triton_reduction import sum_of_squares as fused

    parts = _parts(dtype)
    parts[-1] = parts[-1][:, 3:20]
    expected = plain_sum_of_squares([part.cpu() for part in parts])
    assert float(fused(parts)) == pytest.approx(float(expected), rel=1e-13)
    # Squares beyond fp32 at both ends.
    for value in (1e30, 1e-30):
        parts = [torch.full((20_000,), value, device=DEVICE, dtype=dtype)]
        assert float(fused(parts)) == pytest.approx(20_000 * value**2, rel=1e-6)
    parts[0][7] = math.inf
    assert float(fused(parts)) == math.inf
