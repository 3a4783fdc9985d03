"""FP8 quantisation and transposition in one read of the matrix, in Triton: the compiler writes the
transpose with narrow stores.

Imported on CUDA only; the tests run these kernels on a CPU under Triton's interpreter. The plain
twins are in `core/kernels/fp8.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.triton_launch import jit

ROWS: tl.constexpr = tl.constexpr(64)
COLUMNS: tl.constexpr = tl.constexpr(128)
"""Of a tile. Both results are written in runs of at least 64 bytes."""


@jit
def _quantize_both(
    x: tl.tensor,
    scale: tl.tensor,
    flipped_scale: tl.tensor,
    out: tl.tensor,
    flipped: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    BY_ROW: tl.constexpr,
) -> None:
    """One program: a tile. BY_ROW: a scale for each row of each result, else one for all. Numbers
    past the format's largest become that: so the hardware converts.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    values = tl.load(x + i[:, None] * columns + j[None, :], mask=inside, other=0.0).to(tl.float32)
    if BY_ROW:
        by_row = tl.load(scale + i, mask=i < rows, other=1.0)
        by_column = tl.load(flipped_scale + j, mask=j < columns, other=1.0)
        first = (values * tl.div_rn(1.0, by_row)[:, None]).to(out.dtype.element_ty)
        second = (values * tl.div_rn(1.0, by_column)[None, :]).to(out.dtype.element_ty)
    else:
        first = (values * tl.div_rn(1.0, tl.load(scale))).to(out.dtype.element_ty)
        second = first
    tl.store(out + i[:, None] * columns + j[None, :], first, mask=inside)
    tl.store(
        flipped + j[:, None] * rows + i[None, :],
        tl.trans(second),
        mask=(j[:, None] < columns) & (i[None, :] < rows),
    )


@jit
def _transpose(x: tl.tensor, out: tl.tensor, rows: tl.tensor, columns: tl.tensor) -> None:
    """One program: a tile of bytes."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tile = tl.load(x + i[:, None] * columns + j[None, :], mask=inside, other=0)
    tl.store(
        out + j[:, None] * rows + i[None, :],
        tl.trans(tile),
        mask=(j[:, None] < columns) & (i[None, :] < rows),
    )


def quantize_both(
    x: Tensor, scale: Tensor, flipped_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `core.kernels.fp8.quantize_both`; `x` of at most 32 bits."""
    x = x.contiguous()
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=dtype, device=x.device)
    flipped = torch.empty((columns, rows), dtype=dtype, device=x.device)
    if x.numel():
        by_row = max(scale.numel(), flipped_scale.numel()) > 1
        scales = scale.contiguous(), flipped_scale.contiguous()
        _quantize_both[_grid(x)](x, *scales, out, flipped, rows, columns, by_row)
    return out, flipped


def transpose(x: Tensor) -> Tensor:
    """`[m, n]` of a format of 8 bits to `[n, m]`, row by row."""
    rows, columns = x.shape
    out = torch.empty((columns, rows), dtype=x.dtype, device=x.device)
    if x.numel():
        _transpose[_grid(x)](x.view(torch.uint8), out.view(torch.uint8), rows, columns)
    return out


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], ROWS.value), triton.cdiv(x.shape[1], COLUMNS.value)
