"""Triton kernels of cross entropy: what the loss needs of a row in one read (the online softmax of
Milakov & Gimelshein, 2018), and the gradient in one read and one write.

Imported on CUDA only. Legend: t tokens, v local vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.triton_launch import jit

_READ, _READ_WARPS = 2048, 8
_WRITTEN, _WRITTEN_WARPS = 1024, 4
"""Columns at a time: one wide load of eight 16-bit elements for each thread."""


@jit
def _exp(x: tl.tensor) -> tl.tensor:
    """Exp by the unit for powers of two, without the care for subnormal results of `tl.exp`, which
    triples its instructions; these kernels have few to spare beside memory.
    """
    return tl.exp2(x * 1.4426950408889634)


@jit
def _row_statistics(
    logits: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    valid: tl.tensor,
    TOTAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One program: one token. Each wide load has a maximum and a sum of its own, so that no thread
    waits for another before the end.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lane = tl.arange(0, BLOCK // WIDE)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    highest = tl.full((BLOCK // WIDE, 1), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK // WIDE, 1), tl.float32)
    totals = tl.zeros((BLOCK // WIDE, WIDE), tl.float32)
    following = tl.load(logits + lane, mask=lane < valid, other=float("-inf"))
    reference = tl.full((), 0.0, tl.float32)
    if TOTAL:
        reference = tl.max(following).to(tl.float32)
        reference = tl.where(reference == float("-inf"), 0.0, reference)
    for start in range(0, valid, BLOCK):
        x = following.to(tl.float32)
        column = start + lane
        # The next block is on its way while this one is summed.
        ahead = column + BLOCK
        following = tl.load(logits + ahead, mask=ahead < valid, other=float("-inf"))
        before = highest
        highest = tl.maximum(before, tl.max(x, 1, keep_dims=True))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        sums = sums * _exp(before - base) + tl.sum(_exp(x - base), 1, keep_dims=True)
        if TOTAL:
            totals += tl.where(column < valid, x - reference, 0.0)
    top = tl.max(highest)
    base = tl.where(top == float("-inf"), 0.0, top)
    out += 3 * row
    tl.store(out, top)
    tl.store(out + 1, tl.sum(sums * _exp(highest - base)))
    if TOTAL:
        tl.store(out + 2, tl.sum(totals) + valid * (reference - base))
    else:
        tl.store(out + 2, 0.0)


@jit
def _write_gradient(
    logits: tl.tensor,
    labels: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    valid: tl.tensor,
    confidence: tl.tensor,
    share: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * columns + column
    is_token = column < valid
    x = tl.load(at, mask=is_token, other=0.0).to(tl.float32)
    label = tl.load(labels + row).to(tl.int32)
    highest = tl.load(rows + 3 * row)
    log_sum = tl.load(rows + 3 * row + 1)
    scale = tl.load(rows + 3 * row + 2)
    target = tl.where(column == label, confidence + share, share)
    gradient = (_exp(x - highest - log_sum) - target) * scale
    gradient = tl.where(is_token, gradient, 0.0)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=column < columns)


def row_statistics(logits: Tensor, valid: int, total: bool) -> Tensor:
    """`core.kernels.cross_entropy.plain_row_statistics` of logits of at most 32 bits, whose rows
    have no gaps; without `total` the third number, which costs a third of the time, is zero.
    """
    assert logits.stride(-1) == 1
    out = torch.empty((len(logits), 3), dtype=torch.float32, device=logits.device)
    if len(logits):
        wide = 16 // logits.element_size()
        _row_statistics[len(logits),](
            logits, out, logits.stride(0), valid, total, _READ, wide, num_warps=_READ_WARPS
        )
    return out


def write_gradient(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    scale: Tensor,
    part: tuple[int, int],
    smoothing: tuple[float, float],
) -> None:
    """`core.kernels.cross_entropy.plain_write_gradient` of contiguous logits of at most 32 bits."""
    assert logits.is_contiguous()
    tokens, columns = logits.shape
    first, valid = part
    if tokens:
        _write_gradient[tokens, triton.cdiv(columns, _WRITTEN)](
            logits,
            labels - first,
            torch.cat((statistics, scale[:, None]), dim=1),
            columns,
            valid,
            1.0 - smoothing[0],
            smoothing[1],
            _WRITTEN,
            num_warps=_WRITTEN_WARPS,
        )
    # Autograd does not see the kernel write.
    torch.autograd.graph.increment_version(logits)
