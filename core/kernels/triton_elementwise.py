"""Triton kernels between GEMMs, where the compiled function is far from what its bytes take.

Imported on CUDA only; the tests run these kernels on a CPU under Triton's interpreter. Legend: t
tokens, f MLP width, n heads, d head size.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from core.kernels.maxima import remember
from core.kernels.token_rows import token_rows
from core.kernels.triton_launch import jit
from core.kernels.triton_reduction import sum_rows

if TYPE_CHECKING:
    from core.kernels.elementwise import Activation


@jit
def magnitude_bits(x: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Magnitudes as the bits of fp32 numbers, in whose order NaN is the largest; zero outside."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(inside, bits, 0)


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
def _activate(
    x: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    maxima: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One program: BLOCK columns of TOKENS tokens."""
    start = tl.program_id(0).to(tl.int64) * TOKENS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    shift, up_shift = 0.0, 0.0
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up_shift = tl.load(bias + width + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for row in tl.range(start, tl.minimum(start + TOKENS, tokens), num_stages=STAGES):
        at = row * (1 + GATED) * width + column
        gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift
        value, _ = _activation(gate, KIND)
        if GATED:
            value *= tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32) + up_shift
        out = value.to(y.dtype.element_ty)
        tl.store(y + row * width + column, out, mask=inside)
        largest = tl.maximum(largest, magnitude_bits(out, inside))
    tl.store(maxima + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(largest))


@jit
def _activate_back(
    x: tl.tensor,
    bias: tl.tensor,
    dy: tl.tensor,
    dx: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One program: BLOCK columns of TOKENS tokens, and with a bias their sum over those."""
    start = tl.program_id(0).to(tl.int64) * TOKENS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    form = dx.dtype.element_ty
    shift, up_shift = 0.0, 0.0
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up_shift = tl.load(bias + width + column, mask=inside, other=0.0).to(tl.float32)
    total, up_total = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for row in tl.range(start, tl.minimum(start + TOKENS, tokens), num_stages=STAGES):
        at = row * (1 + GATED) * width + column
        gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + shift
        grad = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
        value, slope = _activation(gate, KIND)
        if GATED:
            up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32) + up_shift
            second = grad * value
            grad *= up
            up_total += second
            rounded = second.to(form)
            tl.store(dx + at + width, rounded, mask=inside)
            largest = tl.maximum(largest, magnitude_bits(rounded, inside))
        first = grad * slope
        total += first
        rounded = first.to(form)
        tl.store(dx + at, rounded, mask=inside)
        largest = tl.maximum(largest, magnitude_bits(rounded, inside))
    if bias is not None:
        out = sums + tl.program_id(0).to(tl.int64) * (1 + GATED) * width + column
        tl.store(out, total, mask=inside)
        if GATED:
            tl.store(out + width, up_total, mask=inside)
    tl.store(maxima + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(largest))


@dataclass(frozen=True)
class ActivationLaunch:
    """How an activation with a bias is cut. The bias's gradient depends on `tokens`, so they depend
    on the shape alone and are the same everywhere.
    """

    tokens: int = 128
    """Of one program, at most, one after the other. It reads the bias once, and in the backward
    pass writes a row of partial sums."""
    block: int = 1024
    """Columns of one program: eight 16-bit elements for each thread are one wide load."""
    warps: int = 4
    stages: int = 3
    """Tokens under way."""


_PROGRAMS = 1024
"""Some for each processor of any device."""
FORWARD_LAUNCH, BACKWARD_LAUNCH = ActivationLaunch(tokens=16), ActivationLaunch()
_ONE_TOKEN = ActivationLaunch(tokens=1, stages=1)
"""Without a bias."""


def activation_forward(
    x: Tensor,
    bias: Tensor | None,
    kind: "Activation",
    gated: bool,
    launch: ActivationLaunch = FORWARD_LAUNCH,
) -> Tensor:
    """`act(x + bias)`, or `act(gate) * up` of `[gate | up] + bias`; fp32 arithmetic. Its maxima are
    remembered.

    Args:
        x: `[t, f]`, or `[t, 2f]` where gated, gate first, of at most 32 bits.
        bias: of its width.
        kind: the activation.
        gated: whether `x` holds both.
        launch: how it is cut where there is a bias.

    Returns:
        `[t, f]` in the format of `x`.
    """
    x = x.contiguous()
    tokens, width = x.shape[0], x.shape[1] // (1 + gated)
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    launch = _fitted(launch, bias, y)
    grid, maxima = _grid(y, launch)
    _activate[grid](
        x,
        bias,
        y,
        maxima,
        tokens,
        width,
        gated,
        kind,
        launch.tokens,
        launch.block,
        launch.stages,
        num_warps=launch.warps,
    )
    remember(y, maxima.view(torch.float32))
    return y


def activation_backward(
    x: Tensor,
    bias: Tensor | None,
    dy: Tensor,
    kind: "Activation",
    gated: bool,
    launch: ActivationLaunch = BACKWARD_LAUNCH,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `activation_forward` by `x` and `bias`, in one pass; fp32 arithmetic. The maxima
    of the first are remembered; the second is summed in fp32 and in a fixed order.

    Args:
        x: as given to the forward pass.
        bias: likewise.
        dy: `[t, f]`.
        kind: the activation.
        gated: whether `x` holds gate and up.
        launch: how it is cut where there is a bias.
    """
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if not dy.numel():
        return dx, None if bias is None else torch.zeros_like(bias)
    launch = _fitted(launch, bias, dy)
    grid, maxima = _grid(dy, launch)
    sums = None if bias is None else x.new_empty((grid[0], x.shape[1]), dtype=torch.float32)
    _activate_back[grid](
        x,
        bias,
        dy,
        dx,
        sums,
        maxima,
        *dy.shape,
        gated,
        kind,
        launch.tokens,
        launch.block,
        launch.stages,
        num_warps=launch.warps,
    )
    remember(dx, maxima.view(torch.float32))
    return dx, None if sums is None or bias is None else sum_rows(sums, bias.dtype)


def _fitted(launch: ActivationLaunch, bias: Tensor | None, y: Tensor) -> ActivationLaunch:
    """With fewer tokens for each program where a device's processors would have too few programs,
    and with one where there is no bias.
    """
    if bias is None:
        return _ONE_TOKEN
    blocks = y.shape[0] * triton.cdiv(y.shape[1], launch.block)
    tokens = min(launch.tokens, triton.next_power_of_2(triton.cdiv(blocks, _PROGRAMS)))
    return replace(launch, tokens=tokens)


def _grid(y: Tensor, launch: ActivationLaunch) -> tuple[tuple[int, int], Tensor]:
    """Programs, and where each puts a maximum."""
    grid = (triton.cdiv(y.shape[0], launch.tokens), triton.cdiv(y.shape[1], launch.block))
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
