"""Fused functions between GEMMs: norms, activations, rotary embedding, dropout. Tokens are the
first dimension.

Legend: t tokens (sequence x batch), h width, f MLP width, n heads, d head size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core.kernels.compile import compiled, upcast
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


@compiled
def gated_activation(x: Tensor, bias: Tensor | None, kind: Activation) -> Tensor:
    """`act(gate) * up` of `[t, 2f]`, gate first, to `[t, f]`, after adding a bias `[2f]`."""
    wide = upcast(x) if bias is None else upcast(x) + bias
    gate, up = wide.chunk(2, dim=-1)
    return (activate(gate, kind) * up).to(x.dtype)


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
