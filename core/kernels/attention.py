"""Scaled dot-product attention by the fastest kernel that can do the job.

Legend: s query length, z key length, b batch, n query heads, g key and value heads, d head size.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.kernels.attention_pattern import AttentionDropout, AttentionPattern
from core.kernels.masked_attention import AttentionMask, masked_attention

PRIORITY = [
    # Measured on an H200 at s = 8192, d = 128: cuDNN 554 TFLOP/s forward and 476 backward, torch's
    # flash-2 314 and 279.
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The first that takes a problem runs it; `chosen_attention.py` says which that is."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    dropout: AttentionDropout | None = None,
    mask: AttentionMask | None = None,
) -> Tensor:
    """`softmax(q k^T * scale) v` for grouped queries.

    By torch's fused kernels, cuDNN's first; what hides more than causality does is in
    `masked_attention.py`. With dropout, CUDA kernels draw their mask from a generator seeded by
    layer, step, first sample and first head: the one number in the project that differs between
    layouts. On a CPU the mask is a hash of the global index, like every other.

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
    hides = mask is not None or pattern.window_for(k.shape[0]) is not None
    if hides or (dropout is not None and not q.is_cuda):
        out = masked_attention(qh, kh, vh, pattern, dropout, mask)
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
    with sdpa_kernel(PRIORITY, set_priority=True):
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
