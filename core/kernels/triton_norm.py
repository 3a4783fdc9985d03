"""Triton kernels of RMS norm on the residual stream: the sum before it in the forward pass, and the
gradient that passes it by in the backward pass, are read and written once.

Imported on CUDA only. Legend: t tokens, h width.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.maxima import remember
from core.kernels.triton_elementwise import largest_bits

jit: Callable[[Callable[..., Any]], Any] = triton.jit

MAX_WIDTH = 16384
"""A row must fit into the registers of one block."""
_PROGRAMS = 396
"""Of the backward pass, three for each processor of an H100 or H200. Each sums the weight's
gradient over its rows; the number is the same everywhere, so that results are too."""


@jit
def _forward(
    hidden: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    roots: tl.tensor,
    maxima: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: one token."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    at = row * WIDTH + lane
    form = normed.dtype.element_ty
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        x += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(form)
        tl.store(total + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    root = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
    tl.store(roots + row, root)
    scale = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    y = (x * root).to(form).to(tl.float32) * scale
    rounded = y.to(form)
    tl.store(normed + at, rounded, mask=inside)
    tl.store(maxima + row, largest_bits(rounded, inside))


@jit
def _backward(
    x: tl.tensor,
    weight: tl.tensor,
    roots: tl.tensor,
    dnormed: tl.tensor,
    dtotal: tl.tensor,
    dx: tl.tensor,
    dweight: tl.tensor,
    tokens: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: every `num_programs`-th token, and one row of partial sums of `dweight`."""
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    scale = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), tokens, tl.num_programs(0)):
        at = row * WIDTH + lane
        root = tl.load(roots + row)
        unit = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * root
        dy = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        sums += dy * unit
        dy *= scale
        grad = (dy - unit * (tl.sum(dy * unit) / WIDTH)) * root
        if dtotal is not None:
            grad += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * WIDTH + lane, sums, mask=inside)


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    """Tokens, width, block, warps: 16 elements for each thread."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    return x.numel() // width, width, block, min(max(block // 512, 1), 32)


def forward(
    hidden: Tensor, branch: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hidden + branch` rounded to their format, the RMS norm of that, and fp32 `[t]` what each row
    was multiplied by. The norm's maxima are remembered.

    Args:
        hidden: `[..., h]`, h up to `MAX_WIDTH`, of at most 32 bits.
        branch: the same shape; None: the sum is `hidden` itself.
        weight: `[h]`, of the same format.
        eps: added to the mean square.
    """
    hidden = hidden.contiguous()
    branch = None if branch is None else branch.contiguous()
    tokens, width, block, warps = _shape(hidden)
    normed = torch.empty_like(hidden)
    total = hidden if branch is None else torch.empty_like(hidden)
    roots = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    if tokens:
        maxima = torch.empty((tokens, 1), dtype=torch.int32, device=hidden.device)
        results = total, normed, roots, maxima
        _forward[tokens,](hidden, branch, weight, *results, eps, width, block, num_warps=warps)
        remember(normed, maxima.view(torch.float32))
    return total, normed, roots


def backward(
    x: Tensor, weight: Tensor, roots: Tensor, dnormed: Tensor, dtotal: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum, what came to it directly (`dtotal`) included, and of the weight, which
    is summed in fp32 and in a fixed order.
    """
    dnormed = dnormed.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    tokens, width, block, warps = _shape(x)
    programs = min(tokens, _PROGRAMS)
    dx = torch.empty_like(x)
    dweight = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if tokens:
        _backward[programs,](
            x, weight, roots, dnormed, dtotal, dx, dweight, tokens, width, block, num_warps=warps
        )
    return dx, dweight.sum(0).to(weight.dtype)
