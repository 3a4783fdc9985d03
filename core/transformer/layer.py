"""One pre-norm transformer layer. Which parts it has is said by its specs; an absent norm or
cross-attention is `IDENTITY`.

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
from core.spec import IDENTITY, IdentityOp, ModuleSpec, build_module


@dataclass(frozen=True)
class TransformerLayerSubmodules:
    """The parts of a layer, in the order in which they run."""

    input_norm: ModuleSpec[nn.Module]
    self_attention: ModuleSpec[Any]
    pre_mlp_norm: ModuleSpec[nn.Module]
    mlp: ModuleSpec[Any]
    post_attention_norm: ModuleSpec[nn.Module] = IDENTITY
    """Norm of the attention's output before it is added (Gemma 2)."""
    cross_attention_norm: ModuleSpec[nn.Module] = IDENTITY
    cross_attention: ModuleSpec[Any] = IDENTITY
    """Attention to an encoder's output (T5)."""
    post_mlp_norm: ModuleSpec[nn.Module] = IDENTITY
    """Norm of the MLP's output before it is added (Gemma 2)."""


class TransformerLayer(nn.Module):
    """`x + attention(norm x)`, then cross-attention likewise where there is one, then `x +
    mlp(norm x)`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        name: str,
        submodules: TransformerLayerSubmodules,
    ) -> None:
        """Build the parts.

        Args:
            config: architecture.
            place: axes, format and device.
            name: global name of the layer, `decoder.layers.17`.
            submodules: specs of the parts.
        """
        super().__init__()

        def norm(spec: ModuleSpec[nn.Module]) -> nn.Module:
            return build_module(spec, place, config.hidden_size, config.norm_epsilon)

        def add(branch: str) -> BiasDropoutAdd:
            return BiasDropoutAdd(place.ctx, config.hidden_dropout, f"{name}.{branch}.dropout")

        self.input_norm = norm(submodules.input_norm)
        self.self_attention = build_module(
            submodules.self_attention, config, place, name=f"{name}.self_attention"
        )
        self.post_attention_norm = norm(submodules.post_attention_norm)
        self.attention_add = add("self_attention")
        self.cross_attention_norm = norm(submodules.cross_attention_norm)
        self.cross_attention = build_module(
            submodules.cross_attention, config, place, name=f"{name}.cross_attention"
        )
        self.has_cross_attention = not isinstance(self.cross_attention, IdentityOp)
        self.cross_add = add("cross_attention")
        self.pre_mlp_norm = norm(submodules.pre_mlp_norm)
        self.mlp = build_module(submodules.mlp, config, place)
        self.post_mlp_norm = norm(submodules.post_mlp_norm)
        self.mlp_add = add("mlp")

    def forward(self, hidden: Tensor, info: ForwardInfo) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape."""
        key, add = info.key, self.attention_add
        hidden, normed = fork(self.input_norm, hidden)
        branch, bias = _normed(
            self.post_attention_norm,
            self.self_attention(normed, info),
            self.self_attention.output_bias,
        )
        if self.has_cross_attention:
            hidden, normed = add.and_norm(branch, bias, hidden, key, self.cross_attention_norm)
            branch, bias = self.cross_attention(normed, info), self.cross_attention.output_bias
            add = self.cross_add
        hidden, normed = add.and_norm(branch, bias, hidden, key, self.pre_mlp_norm)
        branch, bias = _normed(self.post_mlp_norm, self.mlp(normed), self.mlp.output_bias)
        out: Tensor = self.mlp_add(branch, bias, hidden, key)
        return out

    def recompute_modules(self, names: Sequence[str], again: Recompute = recomputed) -> None:
        """Recompute `core_attention`, `mlp` or `norm` in training instead of keeping their
        activations; `again` does it.
        """
        parts = {
            "core_attention": [self.self_attention.core_attention],
            "mlp": [self.mlp],
            "norm": [
                self.input_norm,
                self.post_attention_norm,
                self.cross_attention_norm,
                self.pre_mlp_norm,
                self.post_mlp_norm,
            ],
        }
        if self.has_cross_attention:
            parts["core_attention"].append(self.cross_attention.core_attention)
        recompute_parts(parts, names, again)


def _normed(norm: nn.Module, branch: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The norm of a branch's output, whose bias belongs before it; without a norm the bias is left
    for the sum.
    """
    if isinstance(norm, IdentityOp):
        return branch, bias
    return norm(branch if bias is None else branch + bias), None
