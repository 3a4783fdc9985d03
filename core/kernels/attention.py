"""Scaled dot-product attention by the fastest kernel that can do the job.

Legend: s query length, z key length, b batch, n query heads, g key and value heads, d head size.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from core.errors import ConfigError
from core.kernels.compile import upcast
from core.parallel.random import DropoutKey, philox

_PRIORITY = [
    # Measured on an H200 at s = 8192, d = 128: cuDNN 554 TFLOP/s forward and 476 backward, torch's
    # flash-2 314 and 279.
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys a query sees, and how scores are scaled."""

    causal: bool
    scale: float
    window: int | None = None
    """causal only: a query sees itself and this many keys less one before it."""

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError(f"window {self.window} needs causal attention: set causal")

    def window_for(self, keys: int) -> int | None:
        """The window where it hides anything at all."""
        return self.window if self.window is not None and self.window < keys else None


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout on attention weights."""

    p: float
    key: DropoutKey
    name: str
    """Global name of this dropout, unique in the model."""
    first_head: int
    """Global index of this rank's first query head."""
    total_heads: int
    """Query heads of the whole layer."""


@dataclass(frozen=True)
class QueryPositions:
    """Queries whose place differs from row to row of a batch: those of generation."""

    positions: Tensor
    """int64 `[b, s]`: of each query among the keys, which stand at 0 to z - 1."""


def visible(pattern: AttentionPattern, query: Tensor, z: int) -> Tensor:
    """Boolean `[..., s, z]`, true where queries at positions `[..., s]` see keys 0 to z - 1."""
    query, key = query[..., None], torch.arange(z, device=query.device)
    seen = query >= key
    window = pattern.window_for(z)
    return seen if window is None else seen & (query - key < window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    dropout: AttentionDropout | None = None,
    mask: QueryPositions | None = None,
) -> Tensor:
    """`softmax(q k^T * scale) v` for grouped queries.

    On CUDA: cuDNN or flash attention; flex attention for a sliding window; torch's choice of kernel
    with an explicit mask for generated tokens, whose few queries leave little to compute. With dropout, CUDA
    kernels draw their mask from a generator seeded by layer, step, first sample and first head: the
    one number in the project that differs between layouts. On a CPU the mask is a hash of the
    global index, like every other.

    Args:
        q: `[s, b, n, d]`.
        k: `[z, b, g, d]`, n a multiple of g.
        v: `[z, b, g, d]`.
        pattern: which keys are seen.
        dropout: None in evaluation.
        mask: what else is hidden, row by row.

    Returns:
        `[s, b, n, d]`, in memory as the kernel likes.

    Raises:
        ConfigError: dropout with a window that hides something, on CUDA.
    """
    qh, kh, vh = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    window = pattern.window_for(kh.shape[2])
    if mask is not None:
        assert dropout is None and pattern.causal, "tokens are generated from left to right"
        out = _masked(qh, kh, vh, pattern, visible(pattern, mask.positions, kh.shape[2]))
    elif dropout is not None and not q.is_cuda:
        out = _explicit(qh, kh, vh, pattern, dropout)
    elif window is not None:
        if dropout is not None:
            raise ConfigError(
                f"attention_dropout {dropout.p} with sliding_window {window} is only built for the "
                "CPU: set attention_dropout to 0"
            )
        out = _windowed(qh, kh, vh, pattern, window)
    else:
        out = _sdpa(qh, kh, vh, pattern, dropout)
    return out.permute(2, 0, 1, 3)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, dropout: AttentionDropout | None
) -> Tensor:
    call: Callable[..., Tensor] = functools.partial(
        F.scaled_dot_product_attention,
        q,
        k,
        v,
        is_causal=pattern.causal,
        scale=pattern.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if not q.is_cuda:
        return call()
    with sdpa_kernel(_PRIORITY, set_priority=True):
        if dropout is None:
            return call()
        with torch.random.fork_rng(devices=[q.device]):
            # Of its own for every part of the heads and of the global batch.
            stream = f"{dropout.name}.{dropout.first_head}.{dropout.key.first_sample}"
            torch.cuda.manual_seed(dropout.key.stream(stream) & (2**63 - 1))
            return call(dropout_p=dropout.p)


def _windowed(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, window: int) -> Tensor:
    if not q.is_cuda:
        return _masked(q, k, v, pattern, _causal(pattern, q, k))
    gqa = q.shape[1] != k.shape[1]
    blocks = _block_mask(q.shape[2], k.shape[2], window, q.device)
    return _compiled_flex()(q, k, v, block_mask=blocks, scale=pattern.scale, enable_gqa=gqa)


def _causal(pattern: AttentionPattern, q: Tensor, k: Tensor) -> Tensor:
    return visible(pattern, torch.arange(q.shape[2], device=q.device), k.shape[2])


def _masked(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, seen: Tensor) -> Tensor:
    """With an explicit mask, `[s, z]` or `[b, s, z]`. The queries of a group stand one after
    another in its one head, as fused kernels take no mask together with grouped queries.
    """
    repeat = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (k.shape[1], repeat)).flatten(2, 3)
    mask = torch.cat([seen if seen.dim() == 2 else seen[:, None]] * repeat, dim=-2)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=pattern.scale)
    return out.unflatten(2, (repeat, -1)).flatten(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=8)
def _block_mask(s: int, z: int, window: int, device: torch.device) -> BlockMask:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(seen, None, None, s, z, device=str(device))


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, dropout: AttentionDropout
) -> Tensor:
    """All scores in memory: for small problems on a CPU, where the mask must not depend on the
    layout.
    """
    b, n, s, _ = q.shape
    z = k.shape[2]
    repeat = n // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = upcast(q @ k.transpose(-1, -2)) * pattern.scale
    if pattern.causal:
        scores = scores.masked_fill(~_causal(pattern, q, k), float("-inf"))
    weights = scores.softmax(-1)
    sample = torch.arange(b, device=q.device) + dropout.key.first_sample
    head = torch.arange(n, device=q.device) + dropout.first_head
    row = sample[:, None] * dropout.total_heads + head
    row = row[..., None] * s + torch.arange(s, device=q.device)
    index = row[..., None] * z + torch.arange(z, device=q.device)
    kept = philox(dropout.key.stream(dropout.name), index)[0] >= int(dropout.p * 2**32)
    weights = torch.where(kept, weights / (1.0 - dropout.p), 0.0)
    return weights.to(v.dtype) @ v


def chosen_kernel(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> str:
    """The kernel that causal training attention of `[s, b, n, d]` will run on this CUDA device.

    A choice other than cuDNN is logged as a warning with torch's own reasons.
    """
    s, b, n, d = shape
    q = torch.empty((b, n, s, d), dtype=dtype, device="cuda", requires_grad=True)
    k = torch.empty((b, groups, s, d), dtype=dtype, device="cuda", requires_grad=True)
    with sdpa_kernel(_PRIORITY, set_priority=True):
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=n != groups)
        name = SDPBackend(choice).name
        if name != "CUDNN_ATTENTION":
            logger.warning("attention runs on %s: cuDNN attention was refused", name)
            params = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, n != groups)
            torch.backends.cuda.can_use_cudnn_attention(params, debug=True)
    return name
