"""Triton kernels of RMS norm and layer norm on the residual stream: the sum before it in the
forward pass, and the gradient that passes it by in the backward pass, are read and written once.

Imported on CUDA only. Legend: t tokens, n heads that are normed each on its own (1 for a hidden
state), h width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from core.kernels.maxima import remember
from core.kernels.token_rows import token_rows
from core.kernels.triton_elementwise import magnitude_bits
from core.kernels.triton_launch import early, early_options, jit
from core.kernels.triton_reduction import sum_rows

MAX_ELEMENTS = 16384
"""What one token has must fit into the registers of one block."""


@dataclass(frozen=True)
class Launch:
    """How the backward pass is cut. Results depend on `programs` and `block`, so they are the same
    everywhere.
    """

    programs: int = 132
    """One for each processor of an H100 or H200. Each sums the gradients of the parameters over its
    tokens, and writes a row for each parameter: with more of them, what is written counts."""
    block: int = 8192
    """Elements that a program takes at a time: of several tokens where they are short."""
    elements: int = 32
    """For each thread: four wide loads of 16-bit elements from each of three tensors."""
    stages: int = 3
    """Tokens under way: the next ones are fetched into shared memory while one is computed. Fewer
    where they have no room."""


LAUNCH = Launch()
_ELEMENTS = 32
"""For each thread of the forward pass."""


@jit
def _add_pairs(a: tl.tensor, b: tl.tensor, more_a: tl.tensor, more_b: tl.tensor) -> Any:
    return a + more_a, b + more_b


@jit
def _forward(
    hidden: tl.tensor,
    branch: tl.tensor,
    extra: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    statistics: tl.tensor,
    EPS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program: the heads of one token. Without a bias it is RMS norm. Behind the statistics of
    all tokens come their largest magnitudes. If it is launched EARLY, what comes before it on the
    stream may still run.
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (head < HEADS) & (lane < WIDTH)
    at = head * WIDTH + lane
    own = row * (HEADS * WIDTH) + at
    form = normed.dtype.element_ty
    x = tl.load(hidden + row * STRIDE + at, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + own, mask=inside, other=0.0).to(tl.float32)
        if extra is not None:
            added += tl.load(extra + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
        rounded = (x + added).to(form)
        tl.store(total + own, rounded, mask=inside)
        x = rounded.to(tl.float32)
    ours = (row * HEADS + head) * (1 if bias is None else 2)
    if bias is not None:
        mean = tl.sum(x, 1, keep_dims=True) / WIDTH
        tl.store(statistics + ours + 1, mean, mask=head < HEADS)
        # Not the difference of two large sums: the mean may be far from zero.
        x = tl.where(inside, x - mean, 0.0)
    root = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / WIDTH + EPS)
    tl.store(statistics + ours, root, mask=head < HEADS)
    # Not before: it would hold registers, and so keep other tokens out, while the sums are awaited.
    scale = tl.load(weight + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    if bias is None:
        y = (x * root).to(form).to(tl.float32) * scale
    else:
        y = x * root * scale + tl.load(bias + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    rounded = y.to(form)
    tl.store(normed + own, rounded, mask=inside)
    maxima = statistics + tl.num_programs(0).to(tl.int64) * HEADS * (1 if bias is None else 2)
    tl.store(maxima + row, tl.max(magnitude_bits(rounded, inside)).to(tl.float32, bitcast=True))


@jit
def _backward(
    x: tl.tensor,
    weight: tl.tensor,
    statistics: tl.tensor,
    dnormed: tl.tensor,
    dtotal: tl.tensor,
    dx: tl.tensor,
    sums: tl.tensor,
    tokens: tl.tensor,
    CENTRED: tl.constexpr,
    EXTRA: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One program: TOKENS at a time, of which each has HEADS rows, and for each parameter one row
    of partial sums: weight, bias (CENTRED), bias of the branch (EXTRA). EARLY as in `_forward`.
    """
    if EARLY:
        gdc_wait()
    row = tl.arange(0, ROW_BLOCK)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    columns = lane < WIDTH
    at = row // HEADS * STRIDE + row % HEADS * WIDTH + lane
    scale = tl.load(weight + lane, mask=columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROW_BLOCK, BLOCK), tl.float32)
    dbias = tl.zeros((ROW_BLOCK, BLOCK), tl.float32)
    dextra = tl.zeros((ROW_BLOCK, BLOCK), tl.float32)
    start = tl.program_id(0).to(tl.int64) * TOKENS
    for first in tl.range(start, tokens, tl.num_programs(0) * TOKENS, num_stages=STAGES):
        rows = row < tl.minimum(tokens - first, TOKENS) * HEADS
        inside = rows & columns
        own = first * (HEADS * WIDTH) + row * WIDTH + lane
        unit = tl.load(x + first * STRIDE + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dnormed + own, mask=inside, other=0.0).to(tl.float32)
        ours = (first * HEADS + row) * (2 if CENTRED else 1)
        root = tl.load(statistics + ours, mask=rows, other=0.0)
        if CENTRED:
            unit = (unit - tl.load(statistics + ours + 1, mask=rows, other=0.0)) * root
            dbias += dy
        else:
            unit = unit * root
        dweight += dy * unit
        grad = dy * scale
        # Beyond the width `grad` is zero, and `unit` is not looked at.
        if CENTRED:
            # Both at once: what a sum costs is that the warps wait for each other.
            along, across = tl.reduce((grad * unit, grad), 1, _add_pairs, keep_dims=True)
            share = root / WIDTH
            grad = grad * root - (unit * (along * share) + across * share)
        else:
            along = tl.sum(grad * unit, 1, keep_dims=True) * (root / WIDTH)
            grad = grad * root - unit * along
        if dtotal is not None:
            grad += tl.load(dtotal + own, mask=inside, other=0.0).to(tl.float32)
        if EXTRA:
            dextra += tl.where(inside, grad, 0.0)
        tl.store(dx + own, grad.to(dx.dtype.element_ty), mask=inside)
    kinds: tl.constexpr = 1 + CENTRED + EXTRA
    out = sums + tl.program_id(0) * kinds * WIDTH + tl.arange(0, BLOCK)
    store = tl.arange(0, BLOCK) < WIDTH
    tl.store(out, tl.sum(dweight, 0), mask=store)
    if CENTRED:
        tl.store(out + WIDTH, tl.sum(dbias, 0), mask=store)
    if EXTRA:
        tl.store(out + (kinds - 1) * WIDTH, tl.sum(dextra, 0), mask=store)


def _warps(block: int, elements: int) -> int:
    """So that each thread has so many elements."""
    return min(max(block // (32 * elements), 1), 32)


def _stages(x: Tensor, block: int, stages: int) -> int:
    """As many as shared memory has room for: all but one wait there, with three rows each."""
    if not x.is_cuda:
        return stages
    properties: Any = torch.cuda.get_device_properties(x.device)
    room = properties.shared_memory_per_block_optin - 4096
    return min(stages, 1 + room // (3 * block * x.element_size()))


def forward(
    hidden: Tensor,
    branch: Tensor | None,
    extra: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden + branch + extra` rounded to their format, its norm, and what of it the backward pass
    needs: fp32 `[t, n, 1]` what each row was multiplied by, and for layer norm (`[t, n, 2]`) its
    mean. The norm's maxima are remembered.

    Args:
        hidden: `[..., h]` or `[s, b, n, h]`, n h up to `MAX_ELEMENTS`, of at most 32 bits.
        branch: the same shape; None: the sum is `hidden` itself.
        extra: `[h]`, the bias of the branch.
        weight: `[h]`, like all of them of the format of `hidden`.
        bias: `[h]`; None: RMS norm.
        eps: added to the mean square.
    """
    hidden, rows = token_rows(hidden if branch is None else hidden.contiguous())
    branch = None if branch is None else branch.contiguous()
    normed = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    total = hidden if branch is None else torch.empty_like(hidden)
    kinds = 1 if bias is None else 2
    count = rows.tokens * rows.heads * kinds
    numbers = torch.empty(count + rows.tokens, dtype=torch.float32, device=hidden.device)
    heads, width = triton.next_power_of_2(rows.heads), triton.next_power_of_2(rows.width)
    if rows.tokens:
        _forward[rows.tokens,](
            hidden,
            branch,
            extra,
            weight,
            bias,
            total,
            normed,
            numbers,
            eps,
            rows.stride,
            rows.heads,
            rows.width,
            heads,
            width,
            early(hidden.device),
            num_warps=_warps(heads * width, _ELEMENTS),
            **early_options(hidden.device),
        )
        remember(normed, numbers[count:].view(-1, 1))
    statistics = numbers[:count].view(rows.tokens, rows.heads, kinds)
    return total, normed, statistics


def backward(
    x: Tensor,
    weight: Tensor,
    statistics: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    has_extra: bool,
    launch: Launch = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum, what came to it directly (`dtotal`) included, and of the parameters:
    rows for weight, bias of layer norm and `extra`, as far as they are there. Those are summed in
    fp32 and in a fixed order.
    """
    x, rows = token_rows(x)
    dnormed = dnormed.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    centred = statistics.shape[-1] == 2
    kinds, width = 1 + centred + has_extra, triton.next_power_of_2(rows.width)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not rows.tokens:
        return dx, weight.new_zeros(kinds, rows.width)
    tokens = max(launch.block // (rows.heads * width), 1)
    programs = min(triton.cdiv(rows.tokens, tokens), launch.programs)
    row_block = triton.next_power_of_2(tokens * rows.heads)
    sums = torch.empty((programs, kinds, rows.width), dtype=torch.float32, device=x.device)
    _backward[programs,](
        x,
        weight,
        statistics,
        dnormed,
        dtotal,
        dx,
        sums,
        rows.tokens,
        centred,
        has_extra,
        rows.stride,
        rows.heads,
        rows.width,
        tokens,
        row_block,
        width,
        _stages(x, row_block * width, launch.stages),
        early(x.device),
        num_warps=_warps(row_block * width, launch.elements),
        **early_options(x.device),
    )
    return dx, sum_rows(sums, weight.dtype)
