"""Fused functions between GEMMs: norms, activations, rotary embedding, dropout. Tokens are the
first dimension.

Legend: t tokens (sequence x batch), h width, f MLP width, n heads, d head size.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels.compile import compiled, has_triton_twin, upcast
from core.kernels.token_rows import heads_of
from core.parallel.random import philox


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (Zhang & Sennrich, 2019) of the last dimension.

    The normalised value is rounded to the input's format before the weight is applied, as Hugging
    Face does.

    Args:
        x: `[..., h]`.
        weight: `[h]`.
        eps: added to the mean square.
    """
    if _norm_by_kernel(x, weight):
        return _AddNorm.apply(x, None, None, weight, None, eps)[1]
    return plain_rms_norm(x, weight, eps)


@compiled
def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` with the gradient that autograd finds."""
    wide = upcast(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm (Ba et al., 2016) of the last dimension of `[..., h]`, computed in at least
    fp32.
    """
    if _norm_by_kernel(x, weight, bias):
        return _AddNorm.apply(x, None, None, weight, bias, eps)[1]
    return plain_layer_norm(x, weight, bias, eps)


@compiled
def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm` with the gradient that autograd finds."""
    wide = upcast(x)
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * upcast(weight) + upcast(bias)).to(x.dtype)


def add_norm(
    hidden: Tensor,
    branch: Tensor | None,
    extra: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`hidden + branch + extra` and the norm of that; without a branch, `hidden` and its norm.

    Both uses of the sum being known here, their gradients meet in one pass over memory.

    Args:
        hidden: `[..., h]`.
        branch: the same shape.
        extra: `[h]`, the bias of the branch.
        weight: `[h]`.
        bias: `[h]`; with it the norm is layer norm, without RMS norm.
        eps: added to the variance or mean square.
    """
    if _norm_by_kernel(hidden, branch, extra, weight, bias):
        return _AddNorm.apply(hidden, branch, extra, weight, bias, eps)
    return plain_add_norm(hidden, branch, extra, weight, bias, eps)


def plain_add_norm(
    hidden: Tensor,
    branch: Tensor | None,
    extra: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`add_norm` in parts."""
    total = hidden
    if branch is not None:
        total = add_bias(branch.flatten(0, -2), extra, hidden.flatten(0, -2))
        total = total.reshape(hidden.shape)
    if bias is None:
        return total, plain_rms_norm(total, weight, eps)
    return total, plain_layer_norm(total, weight, bias, eps)


def _norm_by_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the hand-written kernels take a norm of `x`.

    Compiled, the sum over tokens of a weight's gradient is cut into as many pieces as suited the
    first number of tokens; theirs is not.
    """
    if not has_triton_twin(x) or any(y is not None and y.dtype != x.dtype for y in others):
        return False
    from core.kernels.triton_norm import MAX_ELEMENTS

    return heads_of(x) * x.shape[-1] <= MAX_ELEMENTS


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        branch: Tensor | None,
        extra: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        from core.kernels import triton_norm

        total, normed, statistics = triton_norm.forward(hidden, branch, extra, weight, bias, eps)
        ctx.save_for_backward(total, weight, statistics)
        ctx.added, ctx.has_extra = branch is not None, extra is not None
        ctx.centred = bias is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from core.kernels import triton_norm

        total, weight, statistics = ctx.saved_tensors
        dtotal, dnormed = grads
        dhidden, dweight, dbias, dextra = dtotal, None, None, None
        if dnormed is not None:
            dhidden, sums = triton_norm.backward(
                total, weight, statistics, dnormed, dtotal, ctx.has_extra
            )
            dweight = sums[0]
            dbias = sums[1] if ctx.centred else None
            dextra = sums[-1] if ctx.has_extra else None
        elif dtotal is not None and ctx.has_extra:
            dextra = dtotal.flatten(0, -2).sum(0)
        return dhidden, dhidden if ctx.added else None, dextra, dweight, dbias, None


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The activation itself."""
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def mlp_activation(x: Tensor, bias: Tensor | None, kind: Activation, gated: bool) -> Tensor:
    """`act(x + bias)` of `[t, f]`, or where gated `act(gate) * up` of `[gate | up] + bias`, `[t,
    2f]`, to `[t, f]`.
    """
    if has_triton_twin(x):
        return _Activation.apply(x, bias, kind, gated)
    return plain_mlp_activation(x, bias, kind, gated)


@compiled
def plain_mlp_activation(x: Tensor, bias: Tensor | None, kind: Activation, gated: bool) -> Tensor:
    """`mlp_activation` with the gradient that autograd finds."""
    wide = upcast(x) if bias is None else upcast(x) + bias
    if not gated:
        return activate(wide, kind).to(x.dtype)
    gate, up = wide.chunk(2, dim=-1)
    return (activate(gate, kind) * up).to(x.dtype)


class _Activation(torch.autograd.Function):
    """Keeps `x` alone. The compiler's backward pass takes 2.2 times what its bytes take where gated
    (606 us at 8192 x 14336 on an H200) and 4.6 times with a bias, whose gradient it finds by a pass
    of its own (870 us at 16384 x 8192); so that one is written by hand, and the forward pass with
    it, for the maxima that both find on their way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: Activation, gated: bool) -> Tensor:
        from core.kernels.triton_elementwise import activation_forward

        ctx.save_for_backward(x, bias)
        ctx.kind, ctx.gated = kind, gated
        return activation_forward(x, bias, kind, gated)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from core.kernels.triton_elementwise import activation_backward

        x, bias = ctx.saved_tensors
        return *activation_backward(x, bias, grads[0], ctx.kind, ctx.gated), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    wide = upcast(rotated)
    a, b = wide.chunk(2, dim=-1)
    out = (wide * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding in half-split form: dimension i is paired with i + r / 2.

    Args:
        q: `[s, b, n, d]`.
        k: `[s, b, groups, d]`.
        cos: `[s, r]`, r <= d, or `[s, b, r]` where positions differ from row to row; dimensions
            from r on are left as they are. Not differentiated.
        sin: likewise.
    """
    if has_triton_twin(q) and q.dtype == k.dtype:
        return _Rotary.apply(q, k, cos, sin)
    return plain_rotary(q, k, cos, sin)


@compiled
def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` with the gradient that autograd finds."""
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


class _Rotary(torch.autograd.Function):
    """Keeps the tables alone: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from core.kernels.triton_elementwise import turn

        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from core.kernels.triton_elementwise import turn

        (dq, dk), (cos, sin) = grads, ctx.saved_tensors
        return *turn(dq, dk, cos, sin, back=True), None, None


@compiled
def add_bias(x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual + x + bias` for a branch without dropout, `[t, h]`."""
    return residual + (x if bias is None else x + bias)


@compiled
def drop(x: Tensor, rows: Tensor, low: Tensor, high: Tensor, p: float) -> Tensor:
    """Dropout by global element index, so that a slice draws the mask of the whole.

    Args:
        x: `[t, h]`, whole rows of the global tensor.
        rows: int64 `[t]`, the index of each row in the global tensor.
        low: 0-dim int64, the low word of the stream's key.
        high: 0-dim int64, its high word.
        p: probability of dropping an element.
    """
    columns = torch.arange(x.shape[-1], device=x.device)
    bits = philox((low, high), rows[:, None] * x.shape[-1] + columns)[0]
    return torch.where(bits >= int(p * 2**32), x / (1.0 - p), torch.zeros_like(x))
