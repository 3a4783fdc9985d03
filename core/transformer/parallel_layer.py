"""A pre-norm transformer layer whose attention and MLP stand side by side.

Legend: s sequence, b batch, h width; s / tp under sequence parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.config.transformer import TransformerConfig
from core.layers.dropout import BiasDropoutAdd
from core.layers.forward_info import ForwardInfo
from core.layers.norm import fork
from core.parallel.placement import Placement
from core.parallel.recompute import Recompute, recompute_parts, recomputed
from core.spec import ModuleSpec, build_module


@dataclass(frozen=True)
class ParallelResidualLayerSubmodules:
    """The parts of a layer; both norms see the layer's input."""

    input_norm: ModuleSpec[nn.Module]
    self_attention: ModuleSpec[Any]
    pre_mlp_norm: ModuleSpec[nn.Module]
    mlp: ModuleSpec[Any]


class ParallelResidualLayer(nn.Module):
    """`x + attention(norm x) + mlp(norm x)`, with a norm for each branch (Black et al.,
    "GPT-NeoX-20B", 2022). Its parts have the names of `TransformerLayer`'s.
    """

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        name: str,
        submodules: ParallelResidualLayerSubmodules,
    ) -> None:
        """Build the parts.

        Args:
            config: architecture.
            place: axes, format and device.
            name: global name of the layer, `decoder.layers.17`.
            submodules: specs of the parts.
        """
        super().__init__()
        width, eps = config.hidden_size, config.norm_epsilon
        self.input_norm = build_module(submodules.input_norm, place, width, eps)
        self.self_attention = build_module(
            submodules.self_attention, config, place, name=f"{name}.self_attention"
        )
        self.attention_add = BiasDropoutAdd(
            place.ctx, config.hidden_dropout, f"{name}.self_attention.dropout"
        )
        self.pre_mlp_norm = build_module(submodules.pre_mlp_norm, place, width, eps)
        self.mlp = build_module(submodules.mlp, config, place)
        self.mlp_add = BiasDropoutAdd(place.ctx, config.hidden_dropout, f"{name}.mlp.dropout")

    def forward(self, hidden: Tensor, info: ForwardInfo) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape."""
        hidden, normed = fork(self.input_norm, hidden)
        attended = self.self_attention(normed, info)
        hidden, normed = fork(self.pre_mlp_norm, hidden)
        branch = self.mlp(normed)
        bias = self.self_attention.output_bias
        hidden = self.attention_add(attended, bias, hidden, info.key)
        out: Tensor = self.mlp_add(branch, self.mlp.output_bias, hidden, info.key)
        return out

    def recompute_modules(self, names: Sequence[str], again: Recompute = recomputed) -> None:
        """Recompute `core_attention`, `mlp` or `norm` in training instead of keeping their
        activations; `again` does it.
        """
        parts = {
            "core_attention": [self.self_attention.core_attention],
            "mlp": [self.mlp],
            "norm": [self.input_norm, self.pre_mlp_norm],
        }
        recompute_parts(parts, names, again)
