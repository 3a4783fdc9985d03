"""Triton kernels that sum, in a fixed order. Imported on CUDA only."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from core.kernels.triton_launch import early, early_options, jit

_BLOCK, _ROUNDS = 1024, 16
"""Two wide loads of four fp32 elements for each thread of four warps, so many times."""
_COLUMNS, _ROWS_AT_A_TIME = 32, 256
"""Of the sum over rows: one line of fp32 numbers from each."""


@jit
def _sum_of_squares(
    x: tl.tensor, out: tl.tensor, numel: tl.tensor, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
) -> None:
    """One program: BLOCK * ROUNDS elements, to one number."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    sums = tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(ROUNDS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float64)
        sums += value * value
    tl.store(out + tl.program_id(0), tl.sum(sums))


def sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """`core.kernels.reduction.sum_of_squares`.

    Every lane adds in fp64: at one conversion and one multiplication an element these GPUs are
    still faster than their memory, while squares in fp32 could overflow. Blocks are summed in a
    fixed order, without atomics.
    """
    sizes = [triton.cdiv(part.numel(), _BLOCK * _ROUNDS) for part in parts]
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=parts[0].device)
    for part, out in zip(parts, sums.split(sizes), strict=True):
        if part.numel():
            _sum_of_squares[len(out),](part.contiguous(), out, part.numel(), _BLOCK, _ROUNDS)
    return sums.sum()


@jit
def _sum_rows(
    sums: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program: COLUMNS of all rows, ROWS at a time. If it is launched EARLY, the kernel that
    writes them may still run.
    """
    if EARLY:
        gdc_wait()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < width)
        total += tl.load(sums + row * width + column, mask=inside, other=0.0)
    summed = tl.sum(total, 0, keep_dims=True)
    tl.store(out + column, summed.to(out.dtype.element_ty), mask=column < width)


def sum_rows(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, for what the programs of the kernel before have written.

    Args:
        sums: `[p, ...]`, fp32 and contiguous, p from one to some hundreds.
        dtype: of the result.
    """
    out = torch.empty(sums.shape[1:], dtype=dtype, device=sums.device)
    _sum_rows[triton.cdiv(out.numel(), _COLUMNS),](
        sums,
        out,
        len(sums),
        out.numel(),
        _COLUMNS,
        _ROWS_AT_A_TIME,
        early(sums.device),
        num_warps=8,
        **early_options(sums.device),
    )
    return out
