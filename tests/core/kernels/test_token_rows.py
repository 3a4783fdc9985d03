import pytest
import torch

from core.kernels.token_rows import TokenRows, token_rows

QKV = torch.arange(5 * 2 * 6 * 8.0).view(5, 2, 6, 8)


@pytest.mark.parametrize(
    ("x", "rows", "copied"),
    [
        (QKV[:, :, 1:4], TokenRows(10, 48, 3, 8), False),
        (QKV[:, :1, :4], TokenRows(5, 96, 4, 8), False),
        (QKV[:, :, 2:3], TokenRows(10, 48, 1, 8), False),
        (QKV[:, :, 2], TokenRows(10, 48, 1, 8), False),
        (QKV[:1, :1], TokenRows(1, 48, 6, 8), False),
        (QKV.flatten(2), TokenRows(10, 48, 1, 48), False),
        (QKV.transpose(0, 1), TokenRows(10, 48, 6, 8), True),
        (QKV[..., :4], TokenRows(10, 24, 6, 4), True),
        (QKV[..., :1, :1, :].expand(5, 2, 3, 8), TokenRows(10, 24, 3, 8), True),
        (QKV[..., ::2], TokenRows(10, 24, 6, 4), True),
        (QKV[:0], TokenRows(0, 48, 6, 8), False),
    ],
)
def test_rows(x: torch.Tensor, rows: TokenRows, copied: bool) -> None:
    same, found = token_rows(x)
    assert found == rows
    assert (same.data_ptr() != x.data_ptr()) == copied
    size = found.tokens, found.heads, found.width
    laid = same.as_strided(size, (found.stride, found.width, 1), same.storage_offset())
    assert torch.equal(laid.flatten(), x.flatten())
