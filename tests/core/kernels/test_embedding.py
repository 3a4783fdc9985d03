import pytest
import torch
import torch.nn.functional as F

from core.kernels.embedding import add_rows, look_up

ROWS = torch.tensor([[3, 0], [-1, 4], [7, 3]])
HERE = torch.tensor([[True, True], [False, True], [False, True]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_elsewhere_are_zeros(dtype: torch.dtype) -> None:
    table = torch.randn(5, 6, dtype=torch.float64).to(dtype)
    found = look_up(ROWS, table)
    assert found.dtype == dtype
    assert torch.equal(found[HERE], F.embedding(ROWS[HERE], table))
    assert not found[~HERE].any()


def test_values_are_added_in_the_format_of_the_table() -> None:
    table, values = torch.ones(5, 6), torch.randn(6, 6).bfloat16()
    values[2] = values[4] = torch.nan  # of other tables
    add_rows(table, ROWS.flatten(), values)
    expected = torch.ones(5, 6)
    expected[3] += values[0].float() + values[5].float()
    expected[0] += values[1].float()
    expected[4] += values[3].float()
    torch.testing.assert_close(table, expected)
