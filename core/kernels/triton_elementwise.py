"""Triton kernels between GEMMs, where the compiled function is far from what its bytes take.

Imported on CUDA only; the tests run these kernels on a CPU under Triton's interpreter. Legend: t
tokens, f MLP width, n heads, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.maxima import remember
from core.kernels.token_rows import token_rows

if TYPE_CHECKING:
    from core.kernels.elementwise import Activation

jit: Callable[[Callable[..., Any]], Any] = triton.jit

_GATED_BLOCK = 1024
"""Eight 16-bit elements for each of the 128 threads of four warps: one wide load."""


@jit
def largest_bits(x: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The largest magnitude as the bits of an fp32 number, in whose order NaN is the largest."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(tl.where(inside, bits, 0))


@jit
def _activation(gate: tl.tensor, KIND: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Value and slope."""
    if KIND == "silu":
        share = tl.sigmoid(gate)
        value = gate * share
        slope = share * (1.0 + gate * (1.0 - share))
    elif KIND == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
        value = gate * share
        slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        # (1 + tanh z) / 2 is the sigmoid of 2 z.
        square = gate * gate
        share = tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
        value = gate * share
        inner = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * square)
        slope = share + value * (1.0 - share) * inner
    else:
        tl.static_assert(KIND == "relu")
        value = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0.0, 1.0, 0.0)
    return value, slope


@jit
def _gated_forward(
    x: tl.tensor,
    y: tl.tensor,
    maxima: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(gate, KIND)
    out = (value * up).to(y.dtype.element_ty)
    tl.store(y + row * width + column, out, mask=inside)
    tl.store(maxima + row * tl.num_programs(1) + tl.program_id(1), largest_bits(out, inside))


@jit
def _gated_backward(
    x: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    maxima: tl.tensor,
    width: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: BLOCK columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * 2 * width + column
    gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(gate, KIND)
    first = (grad * up * slope).to(dx.dtype.element_ty)
    second = (grad * value).to(dx.dtype.element_ty)
    tl.store(dx + at, first, mask=inside)
    tl.store(dx + at + width, second, mask=inside)
    largest = tl.maximum(largest_bits(first, inside), largest_bits(second, inside))
    tl.store(maxima + row * tl.num_programs(1) + tl.program_id(1), largest)


def gated_forward(x: Tensor, kind: "Activation") -> Tensor:
    """`act(gate) * up` of `[gate | up]`; fp32 arithmetic. Its maxima are remembered.

    Args:
        x: `[t, 2f]`, gate first, of at most 32 bits.
        kind: the activation.

    Returns:
        `[t, f]` in the format of `x`.
    """
    x = x.contiguous()
    tokens, width = x.shape[0], x.shape[1] // 2
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if y.numel():
        grid, maxima = _grid(y)
        _gated_forward[grid](x, y, maxima, width, kind, _GATED_BLOCK)
        remember(y, maxima.view(torch.float32))
    return y


def gated_backward(x: Tensor, dy: Tensor, kind: "Activation") -> Tensor:
    """Gradient of `act(gate) * up` by `[gate | up]`, in one pass; fp32 arithmetic. Its maxima are
    remembered.

    Args:
        x: `[t, 2f]`, gate first, of at most 32 bits.
        dy: `[t, f]`.
        kind: the activation.

    Returns:
        `[t, 2f]` in the format of `x`.
    """
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if dy.numel():
        grid, maxima = _grid(dy)
        _gated_backward[grid](x, dy, dx, maxima, dy.shape[1], kind, _GATED_BLOCK)
        remember(dx, maxima.view(torch.float32))
    return dx


def _grid(y: Tensor) -> tuple[tuple[int, int], Tensor]:
    """Programs, and where each puts a maximum."""
    grid = (y.shape[0], triton.cdiv(y.shape[1], _GATED_BLOCK))
    return grid, torch.empty(grid, dtype=torch.int32, device=y.device)


@dataclass(frozen=True)
class RotaryLaunch:
    """How rotary embedding is cut."""

    heads: int = 32
    """So many at a time: of 64 pairs of dimensions, two wide loads of each half for each thread."""
    warps: int = 4


ROTARY_LAUNCH = RotaryLaunch()


@jit
def _turn_heads(
    x: tl.tensor,
    out: tl.tensor,
    cos_a: tl.tensor,
    cos_b: tl.tensor,
    sin_a: tl.tensor,
    sin_b: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    """The heads of one token."""
    form = out.dtype.element_ty
    column = tl.arange(0, HALF_BLOCK)[None, :]
    for first in tl.static_range(0, HEADS, HEAD_BLOCK):
        head = first + tl.arange(0, HEAD_BLOCK)[:, None]
        at, inside = head * SIZE + column, (head < HEADS) & (column < HALF)
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
        if BACK:
            left, right = a * cos_a + b * sin_b, b * cos_b - a * sin_a
        else:
            left, right = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        tl.store(out + at, left.to(form), mask=inside)
        tl.store(out + at + HALF, right.to(form), mask=inside)
        if SIZE > 2 * HALF:
            rest = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
            at, inside = head * SIZE + rest, (head < HEADS) & (rest < SIZE)
            tl.store(out + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)


@jit
def _turn(
    q: tl.tensor,
    k: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    BACK: tl.constexpr,
    BATCH: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
) -> None:
    """One program: one token; BATCH of them have one row of the tables."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF_BLOCK)[None, :]
    at, inside = row // BATCH * (2 * HALF) + column, column < HALF
    cos_a = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + at + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + at + HALF, mask=inside, other=0.0).to(tl.float32)
    x, out = q + row * q_stride, q_out + row * (HEADS * SIZE)
    _turn_heads(
        x,
        out,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        BACK,
        HEADS,
        SIZE,
        HALF,
        HEAD_BLOCK,
        HALF_BLOCK,
        REST_BLOCK,
    )
    x, out = k + row * k_stride, k_out + row * (GROUPS * SIZE)
    _turn_heads(
        x,
        out,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        BACK,
        GROUPS,
        SIZE,
        HALF,
        GROUP_BLOCK,
        HALF_BLOCK,
        REST_BLOCK,
    )


def turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    back: bool = False,
    launch: RotaryLaunch = ROTARY_LAUNCH,
) -> tuple[Tensor, Tensor]:
    """`core.kernels.elementwise.rotary` in one launch, in fp32 arithmetic; `back`: by the negative
    angles, for its backward pass. Heads are read where they lie in a fused projection.
    """
    (q, queries), (k, keys) = token_rows(q), token_rows(k)
    if cos.dim() == 3:
        cos, sin = (x.expand(*q.shape[:2], -1) for x in (cos, sin))
    cos, sin = cos.contiguous(), sin.contiguous()
    outs = (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
    )
    half = cos.shape[-1] // 2
    if queries.tokens:
        _turn[queries.tokens,](
            q,
            k,
            cos,
            sin,
            *outs,
            queries.stride,
            keys.stride,
            back,
            q.shape[1] if cos.dim() == 2 else 1,
            queries.heads,
            keys.heads,
            queries.width,
            half,
            min(launch.heads, triton.next_power_of_2(queries.heads)),
            min(launch.heads, triton.next_power_of_2(keys.heads)),
            triton.next_power_of_2(half),
            triton.next_power_of_2(max(queries.width - 2 * half, 1)),
            num_warps=launch.warps,
        )
    return outs
