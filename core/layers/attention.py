"""Self-attention with grouped queries, heads cut over tp.

Legend: s sequence of queries, z of keys, b batch, h width, n query heads and g key heads of this
rank, d head size.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.config.transformer import TransformerConfig
from core.kernels.attention import attention
from core.kernels.attention_pattern import AttentionDropout, AttentionPattern
from core.kernels.elementwise import rotary
from core.kernels.masked_attention import AttentionMask
from core.layers.forward_info import ForwardInfo
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.parallel.cutting import Block, split_units
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey, normal_init
from core.spec import IDENTITY, ModuleSpec, build_module


class CoreAttention(nn.Module):
    """The attention itself, without weights."""

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        name: str,
        causal: bool,
        window: int | None = None,
    ) -> None:
        super().__init__()
        scale = config.attention_scale
        if scale is None:
            scale = 1.0 / math.sqrt(config.kv_channels)
        self.pattern = AttentionPattern(causal, scale, window)
        self.p, self.name = config.attention_dropout, name
        self.total_heads = config.num_attention_heads
        self.first_head = split_units(
            config.num_attention_heads, place.ctx.tp.rank, place.ctx.tp.size
        )[0]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key: DropoutKey | None,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """`[s, b, n, d]`, `[z, b, g, d]`, `[z, b, g, d]` to `[s, b, n * d]`; `mask` hides more than
        the layer's pattern, row by row.
        """
        return attention(q, k, v, self.pattern, self._dropout(key), mask).flatten(2, 3)

    def _dropout(self, key: DropoutKey | None) -> AttentionDropout | None:
        if self.p == 0.0 or key is None:
            return None
        return AttentionDropout(self.p, key, self.name, self.first_head, self.total_heads)


@dataclass(frozen=True)
class SelfAttentionSubmodules:
    """The parts of self-attention."""

    linear_qkv: ModuleSpec[ColumnParallelLinear]
    core_attention: ModuleSpec[CoreAttention]
    linear_proj: ModuleSpec[RowParallelLinear]
    q_norm: ModuleSpec[nn.Module] = IDENTITY
    """Norm over each query head, before rotary embedding."""
    k_norm: ModuleSpec[nn.Module] = IDENTITY
    """Norm over each key head, before rotary embedding."""


class HeadsOfRank(nn.Module):
    """What self- and cross-attention share: head counts, the core, the output projection."""

    core_attention: CoreAttention
    linear_proj: RowParallelLinear

    def __init__(self, config: TransformerConfig, place: Placement) -> None:
        super().__init__()
        tp = place.ctx.tp
        self.head_dim = config.kv_channels
        self.heads = split_units(config.num_attention_heads, tp.rank, tp.size)[1]
        self.groups = split_units(config.kv_heads, tp.rank, tp.size)[1]
        self.q_block = Block(config.num_attention_heads, self.head_dim)
        self.kv_block = Block(config.kv_heads, self.head_dim)

    def _build_core(
        self,
        core_attention: ModuleSpec[CoreAttention],
        linear_proj: ModuleSpec[RowParallelLinear],
        config: TransformerConfig,
        place: Placement,
        **params: Any,
    ) -> None:
        """Make the core, with `params`, and the output projection."""
        self.core_attention = build_module(core_attention, config, place, **params)
        self.linear_proj = build_module(
            linear_proj,
            place,
            self.q_block,
            config.hidden_size,
            init=normal_init(config.output_init_std),
            bias=config.attention_output_bias,
            skip_bias_add=True,
        )

    @property
    def output_bias(self) -> Tensor | None:
        """The bias that `forward` leaves to the caller."""
        return self.linear_proj.bias

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, self.head_dim))


class SelfAttention(HeadsOfRank):
    """Queries, keys and values from one fused projection `[q | k | v]`."""

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        name: str,
        submodules: SelfAttentionSubmodules,
        causal: bool = True,
        window: int | None = None,
    ) -> None:
        """Make the projections.

        Args:
            config: architecture.
            place: axes, format and device.
            name: global name of this module, for its dropout stream and the cache.
            submodules: specs of the parts.
            causal: whether a token sees only those before it.
            window: sliding window.
        """
        super().__init__(config, place)
        self.name = name
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            place,
            config.hidden_size,
            [self.q_block, self.kv_block, self.kv_block],
            init=normal_init(config.init_std),
            bias=config.qkv_bias,
        )
        self.q_norm = build_module(
            submodules.q_norm, place, self.head_dim, config.norm_epsilon, per_head=True
        )
        self.k_norm = build_module(
            submodules.k_norm, place, self.head_dim, config.norm_epsilon, per_head=True
        )
        core = {"name": f"{name}.core_attention", "causal": causal, "window": window}
        self._build_core(submodules.core_attention, submodules.linear_proj, config, place, **core)

    def forward(self, x: Tensor, info: ForwardInfo) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape, without the
        output bias.
        """
        qkv = self.linear_qkv(x)
        counts = [self.heads, self.groups, self.groups]
        q, k, v = self._heads(qkv, sum(counts)).split(counts, dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if info.rotary is not None:
            q, k = rotary(q, k, *info.rotary)
        mask: AttentionMask | None = info.documents
        if info.cache is not None:
            k, v, mask = info.cache.extend(self.name, k, v)
        return self.linear_proj(self.core_attention(q, k, v, info.key, mask))
