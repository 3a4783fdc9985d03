"""Which attention kernel a run has, for the start of its log."""

import logging

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.config.data import DataConfig
from core.config.transformer import TransformerConfig
from core.kernels.attention import PRIORITY
from core.parallel.context import ParallelContext

logger = logging.getLogger(__name__)


def attention_lines(
    config: TransformerConfig, data: DataConfig, ctx: ParallelContext, dtype: torch.dtype
) -> list[str]:
    """One line for every kernel that a decoder's layers will run."""
    if ctx.device.type != "cuda":
        return ["attention: torch's CPU kernel"]
    heads = config.num_attention_heads // ctx.tp.size
    groups = max(1, config.kv_heads // ctx.tp.size)
    shape = (data.seq_length, 1, heads, config.kv_channels)
    lines = [f"attention: {chosen_kernel(shape, groups, dtype)}"]
    windows = {config.window_of(i) for i in range(config.num_layers)} - {None}
    if any(window < data.seq_length for window in windows if window is not None):
        lines.append(f"attention with a window of {windows}: flex attention, compiled")
    if data.separate_documents:
        lines.append("attention within documents: flex attention, compiled")
    return lines


def chosen_kernel(shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype) -> str:
    """The kernel that causal training attention of `[s, b, n, d]` will run on this CUDA device.

    A choice other than cuDNN is logged as a warning with torch's own reasons.
    """
    s, b, n, d = shape
    q = torch.empty((b, n, s, d), dtype=dtype, device="cuda", requires_grad=True)
    k = torch.empty((b, groups, s, d), dtype=dtype, device="cuda", requires_grad=True)
    with sdpa_kernel(PRIORITY, set_priority=True):
        choice = torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=n != groups)
        name = SDPBackend(choice).name
        if name != "CUDNN_ATTENTION":
            logger.warning("attention runs on %s: cuDNN attention was refused", name)
            params = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, n != groups)
            torch.backends.cuda.can_use_cudnn_attention(params, debug=True)
    return name
