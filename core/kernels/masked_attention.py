"""Attention that hides more than causality does: sliding windows, documents in one row, the queries
of generation; and on a CPU, dropout.

Legend: s query length, z key length, b batch, n query heads, g key and value heads, d head size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from core.errors import ConfigError
from core.kernels.attention_pattern import AttentionDropout, AttentionPattern, visible
from core.kernels.compile import upcast
from core.parallel.random import philox


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


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    dropout: AttentionDropout | None,
    mask: AttentionMask | None,
) -> Tensor:
    """`attention` of `[b, n, s, d]` with any mask.

    On CUDA flex attention for a sliding window and for documents; for generated tokens, whose few
    queries leave little to compute, torch's choice of kernel with an explicit mask.

    Raises:
        ConfigError: dropout with documents or with a window that hides something, on CUDA.
    """
    window = pattern.window_for(k.shape[2])
    if q.is_cuda and (isinstance(mask, Documents) or (mask is None and window is not None)):
        if dropout is not None:
            raise ConfigError(
                f"attention_dropout {dropout.p} with a sliding window ({window}) or separate "
                "documents is only built for the CPU: set attention_dropout to 0"
            )
        return _flex(q, k, v, pattern, mask)
    if mask is None:
        seen = visible(pattern, torch.arange(q.shape[2], device=q.device), k.shape[2])
    else:
        seen = mask.visible(pattern, k.shape[2])
    if dropout is None:
        return _masked(q, k, v, pattern.scale, seen)
    return _explicit(q, k, v, pattern.scale, seen, dropout)


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
