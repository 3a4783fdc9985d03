"""Rows of a table: looked up, and their gradients added. Legend: t tokens, v rows, h width."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels.compile import has_triton_twin


def look_up(rows: Tensor, table: Tensor) -> Tensor:
    """Rows of a table; zeros for those that it does not have.

    Args:
        rows: int64 of any shape; below zero or from v on: elsewhere.
        table: `[v, h]`.

    Returns:
        `[..., h]`.
    """
    if has_triton_twin(table):
        from core.kernels import triton_embedding

        return triton_embedding.look_up(rows, table)
    return plain_look_up(rows, table)


def plain_look_up(rows: Tensor, table: Tensor) -> Tensor:
    """`look_up` in parts."""
    elsewhere = (rows < 0) | (rows >= len(table))
    found = F.embedding(rows.masked_fill(elsewhere, 0), table)
    return found.masked_fill_(elsewhere[..., None], 0.0)


def add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values to rows of a table; those of rows that it does not have are dropped.

    On CUDA the order of additions differs from run to run, unless torch is told to be
    deterministic.

    Args:
        table: `[v, h]`.
        rows: int64 `[t]`.
        values: `[t, h]`, of any floating-point format.
    """
    wide = table.dtype == torch.float32 and table.is_contiguous() and has_triton_twin(values)
    if wide and not torch.are_deterministic_algorithms_enabled():
        from core.kernels import triton_embedding

        triton_embedding.add_rows(table, rows, values)
    else:
        plain_add_rows(table, rows, values)


def plain_add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """`add_rows` in parts."""
    # Dropping rows for good would need their number on the host, so zeros are added to row 0.
    elsewhere = (rows < 0) | (rows >= len(table))
    values = values.masked_fill(elsewhere[:, None], 0.0).to(table.dtype)
    table.index_add_(0, rows.masked_fill(elsewhere, 0), values)
