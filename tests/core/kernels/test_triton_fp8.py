"""FP8 kernels against their plain twins: on a CPU under Triton's interpreter, on a GPU compiled."""

import pytest
import torch
from torch import Tensor

from core.kernels.fp8 import E4M3, E5M2, quantize, scale_of_whole, scales_of_rows

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (64, 128), (80, 272)])
def test_both_ways_and_back(shape: tuple[int, int], by_row: bool, dtype: torch.dtype) -> None:
    """Edges that no tile divides. The interpreter rounds to FP8 in its own way (it loses the carry
    into the exponent), so exact equality is asked with fp16 results.
    """
    from core.kernels.triton_fp8 import quantize_both, transpose

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = (x * torch.logspace(-6, 1, shape[1])).to(dtype)

    def scale_of(x: Tensor) -> Tensor:
        return scales_of_rows(x, E4M3) if by_row else scale_of_whole(x, E4M3)

    scale, other = scale_of(x), scale_of(x.t())
    given = x.to(DEVICE), scale.to(DEVICE), other.to(DEVICE)
    data, flipped = quantize_both(*given, torch.float16)
    assert torch.equal(data.cpu(), quantize(x, scale, torch.float16))
    assert torch.equal(flipped.cpu(), quantize(x.t(), other, torch.float16))
    data, flipped = quantize_both(*given, E5M2)
    for found, exact in ((data, x / scale), (flipped, x.t() / other)):
        far = (found.cpu().float() - exact).abs() > 0.5 * exact.abs() + 2.0**-16
        assert not bool(far.any())
    assert torch.equal(transpose(data).view(torch.uint8), data.view(torch.uint8).t())
