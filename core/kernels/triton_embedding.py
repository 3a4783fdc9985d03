"""Triton kernels of `core.kernels.embedding`: one pass each, with wide loads, where the parts take
three. Imported on CUDA only.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.triton_launch import jit

_BLOCK = 4096
"""Columns of one program, at most: 16 for each thread of eight warps."""


@jit
def _look_up(
    rows: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    length: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + token)
    here = column < tl.where((row >= 0) & (row < length), WIDTH, 0)
    found = tl.load(table + row * WIDTH + column, mask=here, other=0.0)
    tl.store(out + token * WIDTH + column, found, mask=column < WIDTH)


@jit
def _add_rows(
    table: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    length: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK columns of one token. Other tokens may have the same row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + token)
    here = column < tl.where((row >= 0) & (row < length), WIDTH, 0)
    value = tl.load(values + token * WIDTH + column, mask=here, other=0.0).to(tl.float32)
    tl.atomic_add(table + row * WIDTH + column, value, mask=here, sem="relaxed")


def _launch(kernel: Any, tokens: int, tensors: tuple[Tensor, ...], table: Tensor) -> None:
    length, width = table.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    if tokens:
        kernel[tokens, triton.cdiv(width, block)](
            *tensors, length, width, block, num_warps=min(max(block // 512, 1), 8)
        )


def look_up(rows: Tensor, table: Tensor) -> Tensor:
    """`core.kernels.embedding.look_up`."""
    rows, table = rows.contiguous(), table.contiguous()
    out = torch.empty((*rows.shape, table.shape[1]), dtype=table.dtype, device=table.device)
    _launch(_look_up, rows.numel(), (rows, table, out), table)
    return out


def add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """`core.kernels.embedding.add_rows` to a table in fp32."""
    _launch(_add_rows, rows.numel(), (table, rows.contiguous(), values.contiguous()), table)
