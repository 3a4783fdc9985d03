"""Cross-attention with grouped queries, heads cut over tp.

Legend: s sequence, z encoder sequence, b batch, h width.
"""

from dataclasses import dataclass

from torch import Tensor

from core.config.transformer import TransformerConfig
from core.layers.attention import CoreAttention, HeadsOfRank
from core.layers.forward_info import ForwardInfo
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.parallel.placement import Placement
from core.parallel.random import normal_init
from core.spec import ModuleSpec, build_module


@dataclass(frozen=True)
class CrossAttentionSubmodules:
    """The parts of cross-attention."""

    linear_q: ModuleSpec[ColumnParallelLinear]
    linear_kv: ModuleSpec[ColumnParallelLinear]
    core_attention: ModuleSpec[CoreAttention]
    linear_proj: ModuleSpec[RowParallelLinear]


class CrossAttention(HeadsOfRank):
    """Queries from the decoder, keys and values `[k | v]` from the encoder's output."""

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        name: str,
        submodules: CrossAttentionSubmodules,
    ) -> None:
        super().__init__(config, place)
        init = normal_init(config.init_std)
        self.linear_q = build_module(
            submodules.linear_q,
            place,
            config.hidden_size,
            [self.q_block],
            init=init,
            bias=config.qkv_bias,
        )
        self.linear_kv = build_module(
            submodules.linear_kv,
            place,
            config.hidden_size,
            [self.kv_block, self.kv_block],
            init=init,
            bias=config.qkv_bias,
        )
        core = {"name": f"{name}.core_attention", "causal": False}
        self._build_core(submodules.core_attention, submodules.linear_proj, config, place, **core)

    def forward(self, x: Tensor, info: ForwardInfo) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape, without the
        output bias; `info.encoded` must be there.
        """
        q = self._heads(self.linear_q(x), self.heads)
        kv = self._heads(self.linear_kv(info.encoded), 2 * self.groups)
        k, v = kv.split(self.groups, dim=2)
        return self.linear_proj(self.core_attention(q, k, v, info.key))
