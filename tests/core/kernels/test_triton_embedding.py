"""Triton kernels against the plain functions: on a CPU under Triton's interpreter, on a GPU
compiled."""

import pytest
import torch

from core.kernels.embedding import plain_add_rows, plain_look_up

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rows(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-2, 12, shape, generator=generator).to(DEVICE)


@pytest.mark.parametrize("width", [48, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_look_up(width: int, dtype: torch.dtype) -> None:
    from core.kernels.triton_embedding import look_up

    table = torch.randn(9, width, device=DEVICE).to(dtype)
    for rows in (_rows(7, 2), _rows(2, 7).t(), _rows(0, 3)):
        assert torch.equal(look_up(rows, table), plain_look_up(rows, table))
        other = table[:, ::2]
        assert torch.equal(look_up(rows, other), plain_look_up(rows, other))


@pytest.mark.parametrize("width", [48, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rows(width: int, dtype: torch.dtype) -> None:
    """Most rows come more than once."""
    from core.kernels.triton_embedding import add_rows

    for rows in (_rows(30), _rows(60)[::2], _rows(0)):
        values = torch.randn(width, len(rows), device=DEVICE).to(dtype).t()
        found, expected = torch.ones(2, 9, width, device=DEVICE)
        add_rows(found, rows, values)
        plain_add_rows(expected, rows, values)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
