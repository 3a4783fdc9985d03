"""Fused functions between GEMMs: norms, activations, rotary embedding, dropout. Tokens are the
first dimension.

Legend: t tokens (sequence x batch), h width, f MLP width, n heads, d head size.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels.compile import compiled, has_triton_twin, upcast
from core.parallel.random import philox


@compiled
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm (Zhang & Sennrich, 2019) of the last dimension.

    The normalised value is rounded to the input's format before the weight is applied, as Hugging
    Face does.

    Args:
        x: `[..., h]`.
        weight: `[h]`.
        eps: added to the mean square.
    """
    wide = upcast(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def add_rms_norm(
    hidden: Tensor, branch: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`hidden + branch` and the RMS norm of that; without a branch, `hidden` and its norm.

    Both uses of the sum being known here, their gradients meet in one pass over memory.

    Args:
        hidden: `[..., h]`.
        branch: the same shape.
        weight: `[h]`.
        eps: added to the mean square.
    """
    if has_triton_twin(hidden) and hidden.dtype == weight.dtype:
        from core.kernels.triton_norm import MAX_WIDTH

        if hidden.shape[-1] <= MAX_WIDTH:
            return _AddRMSNorm.apply(hidden, branch, weight, eps)
    return plain_add_rms_norm(hidden, branch, weight, eps)


def plain_add_rms_norm(
    hidden: Tensor, branch: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in parts."""
    total = hidden if branch is None else hidden + branch
    return total, rms_norm(total, weight, eps)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from core.kernels import triton_norm

        total, normed, roots = triton_norm.forward(hidden, branch, weight, eps)
        ctx.save_for_backward(total, weight, roots)
        ctx.added = branch is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        from core.kernels import triton_norm

        total, weight, roots = ctx.saved_tensors
        dtotal, dnormed = grads
        dhidden, dweight = dtotal, None
        if dnormed is not None:
            dhidden, dweight = triton_norm.backward(total, weight, roots, dnormed, dtotal)
        return dhidden, dhidden if ctx.added else None, dweight, None


@compiled
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm (Ba et al., 2016) of the last dimension of `[..., h]`, computed in at least
    fp32.
    """
    wide = upcast(x)
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * upcast(weight) + upcast(bias)).to(x.dtype)


Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The activation itself."""
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def gated_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """`act(gate) * up` of `[t, 2f]`, gate first, to `[t, f]`, after adding a bias `[2f]`."""
    if bias is None and has_triton_twin(x):
        return _GatedActivation.apply(x, kind)
    return plain_gated_activation(x, bias, kind)


@compiled
def plain_gated_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """`gated_activation` with the gradient that autograd finds."""
    wide = upcast(x) if bias is None else upcast(x) + bias
    gate, up = wide.chunk(2, dim=-1)
    return (activate(gate, kind) * up).to(x.dtype)


class _GatedActivation(torch.autograd.Function):
    """Keeps `x` alone. The compiler's backward pass takes 2.2 times what its bytes take (606 us at
    8192 x 14336 on an H200), so that one is written by hand, and the forward pass with it, for the
    maxima that both find on their way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Activation) -> Tensor:
        from core.kernels.triton_elementwise import gated_forward

        ctx.save_for_backward(x)
        ctx.kind = kind
        return gated_forward(x, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from core.kernels.triton_elementwise import gated_backward

        (x,) = ctx.saved_tensors
        return gated_backward(x, grads[0], ctx.kind), None


@compiled
def biased_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """`act(x + bias)` of `[t, f]`."""
    wide = upcast(x) if bias is None else upcast(x) + bias
    return activate(wide, kind).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    wide = upcast(rotated)
    a, b = wide.chunk(2, dim=-1)
    out = (wide * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


@compiled
def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding in half-split form: dimension i is paired with i + r / 2.

    Args:
        q: `[s, b, n, d]`.
        k: `[s, b, groups, d]`.
        cos: `[s, r]`, r <= d, or `[s, b, r]` where positions differ from row to row; dimensions
            from r on are left as they are.
        sin: likewise.
    """
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


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
