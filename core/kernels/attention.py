"""Scaled dot-product attention by the fastest kernel that can do the job.

Legend: s query length, z key length, b batch, n query heads, g key and value heads, d head size.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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


def visible(pattern: AttentionPattern, query: Tensor, z: int) -> Tensor:
    """Boolean `[..., s, z]`, true where queries at positions `[..., s]` see keys 0 to z - 1."""
    query, key = query[..., None], torch.arange(z, device=query.device)
    if not pattern.causal:
        return torch.ones_like(query + key, dtype=torch.bool)
    seen = query >= key
    window = pattern.window_for(z)
    return seen if window is None else seen & (query - key < window)


@dataclass(frozen=True)
class QueryPositions:
    """Queries whose place differs from row to row of a batch: those of generation."""

    positions: Tensor
    """int64 `[b, s]`: of each query among the keys, which stand at 0 to z - 1."""

    def visible(self, pattern: AttentionPattern, z: int) -> Tensor:
        """Boolean `[b, s, z]`, true where a query sees a key."""
        return visible(pattern, self.positions, z)


@dataclass(frozen=True)
class Documents:
    """Rows of several documents, one after another: a token sees its own document alone."""

    ids: Tensor
    """int64 `[b, s]`: which document of its row a token belongs to."""
    positions: Tensor
    """int64 `[b, s]`: of a token in its document."""
    _blocks: dict[AttentionPattern, BlockMask] = field(
        default_factory=dict, repr=False, compare=False
    )
    """By pattern, so that the layers of a forward pass share them."""

    @classmethod
    def between(cls, cu_seqlens: Tensor, s: int) -> "Documents":
        """From the bounds of the documents, int `[b, n + 1]`, on the device and without a wait for
        it: ascending from 0 to `s`, the last as often as it takes to fill the row.
        """
        token = torch.arange(s, device=cu_seqlens.device).expand(cu_seqlens.shape[0], s)
        bounds = cu_seqlens.long()
        ids = torch.searchsorted(bounds[:, 1:].contiguous(), token.contiguous(), right=True)
        return cls(ids, token - bounds.gather(1, ids))

    def visible(self, pattern: AttentionPattern, z: int) -> Tensor:
        """Boolean `[b, s, z]`, true where a query sees a key."""
        same = self.ids[:, :, None] == self.ids[:, None, :]
        return same & visible(pattern, torch.arange(z, device=same.device), z)

    def blocks(self, pattern: AttentionPattern) -> BlockMask:
        """The same for flex attention."""
        if pattern not in self._blocks:
            ids, causal, window = self.ids, pattern.causal, pattern.window_for(self.ids.shape[1])

            def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                found = ids[b, query] == ids[b, key]
                if causal:
                    found = found & (query >= key)
                return found if window is None else found & (query - key < window)

            rows, s = ids.shape
            self._blocks[pattern] = _compiled_block_mask()(
                seen, rows, None, s, s, device=str(ids.device)
            )
        return self._blocks[pattern]


AttentionMask: TypeAlias = QueryPositions | Documents
"""What hides more than a layer's pattern does, row by row."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    dropout: AttentionDropout | None = None,
    mask: AttentionMask | None = None,
) -> Tensor:
    """`softmax(q k^T * scale) v` for grouped queries.

    On CUDA: cuDNN or flash attention; flex attention for a sliding window and for documents; for
    generated tokens, whose few queries leave little to compute, torch's choice of kernel with an
    explicit mask. With dropout, CUDA kernels draw their mask from a generator seeded by layer,
    step, first sample and first head: the one number in the project that differs between layouts.
    On a CPU the mask is a hash of the global index, like every other.

    Args:
        q: `[s, b, n, d]`.
        k: `[z, b, g, d]`, n a multiple of g.
        v: `[z, b, g, d]`.
        pattern: which keys are seen.
        dropout: None in evaluation.
        mask: what is hidden beside, row by row.

    Returns:
        `[s, b, n, d]`, in memory as the kernel likes.

    Raises:
        ConfigError: dropout with documents or with a window that hides something, on CUDA.
    """
    qh, kh, vh = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    window = pattern.window_for(kh.shape[2])
    if q.is_cuda and (isinstance(mask, Documents) or (mask is None and window is not None)):
        if dropout is not None:
            raise ConfigError(
                f"attention_dropout {dropout.p} with a sliding window ({window}) or separate "
                "documents is only built for the CPU: set attention_dropout to 0"
            )
        out = _flex(qh, kh, vh, pattern, mask)
    elif mask is None and window is None and (dropout is None or q.is_cuda):
        out = _sdpa(qh, kh, vh, pattern, dropout)
    else:
        if mask is None:
            seen = visible(pattern, torch.arange(q.shape[0], device=q.device), k.shape[0])
        else:
            seen = mask.visible(pattern, k.shape[0])
        out = (
            _masked(qh, kh, vh, pattern.scale, seen)
            if dropout is None
            else _explicit(qh, kh, vh, pattern.scale, seen, dropout)
        )
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
        with mask_generator(dropout, q.device):
            return call(dropout_p=dropout.p)


@contextmanager
def mask_generator(dropout: AttentionDropout, device: torch.device) -> Iterator[None]:
    """Seed the generator that CUDA kernels draw an attention mask from, and put it back."""
    with torch.random.fork_rng(devices=[device]):
        # Of its own for every part of the heads and of the global batch.
        stream = f"{dropout.name}.{dropout.first_head}.{dropout.key.first_sample}"
        torch.cuda.manual_seed(dropout.key.stream(stream) & (2**63 - 1))
        yield


def _masked(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> Tensor:
    """With an explicit mask, `[s, z]` or `[b, s, z]`. The queries of a group stand one after
    another in its one head, as fused kernels take no mask together with grouped queries.
    """
    repeat = q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (k.shape[1], repeat)).flatten(2, 3)
    mask = torch.cat([seen if seen.dim() == 2 else seen[:, None]] * repeat, dim=-2)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.unflatten(2, (repeat, -1)).flatten(1, 2)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, documents: Documents | None
) -> Tensor:
    """The one kernel for masks in blocks, which skips those that are hidden: the measurements are
    those of benchmarks/varlen_attention.py.
    """
    if documents is None:
        window = pattern.window_for(k.shape[2])
        assert window is not None, "what hides nothing needs no mask"
        blocks = _window_blocks(q.shape[2], k.shape[2], window, q.device)
    else:
        blocks = documents.blocks(pattern)
    gqa = q.shape[1] != k.shape[1]
    out: Tensor = _compiled_flex()(q, k, v, block_mask=blocks, scale=pattern.scale, enable_gqa=gqa)
    return out


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.cache
def _compiled_block_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask)


@functools.lru_cache(maxsize=8)
def _window_blocks(s: int, z: int, window: int, device: torch.device) -> BlockMask:
    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    return create_block_mask(seen, None, None, s, z, device=str(device))


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, dropout: AttentionDropout
) -> Tensor:
    """All scores in memory: for small problems on a CPU, where the mask must not depend on the
    layout.
    """
    b, n, s, _ = q.shape
    z = k.shape[2]
    repeat = n // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = upcast(q @ k.transpose(-1, -2)) * scale
    hidden = ~(seen if seen.dim() == 2 else seen[:, None])
    scores = scores.masked_fill(hidden, float("-inf"))
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
