"""The MLP of a transformer layer, plain or gated. Legend: s sequence, b batch, h width, f inner
width.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from core.config.transformer import TransformerConfig
from core.kernels.elementwise import mlp_activation
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import normal_init
from core.spec import ModuleSpec, build_module


@dataclass(frozen=True)
class MLPSubmodules:
    """The parts of an MLP."""

    linear_fc1: ModuleSpec[ColumnParallelLinear]
    linear_fc2: ModuleSpec[RowParallelLinear]


class MLP(nn.Module):
    """`fc2(act(fc1 x))`, or `fc2(act(gate x) * up x)` with `fc1 = [gate | up]` (Shazeer, 2020)."""

    def __init__(
        self, config: TransformerConfig, place: Placement, *, submodules: MLPSubmodules
    ) -> None:
        super().__init__()
        self.activation, self.gated = config.activation, config.gated_mlp
        inner = Block(config.ffn_hidden_size)
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            place,
            config.hidden_size,
            [inner, inner] if self.gated else [inner],
            init=normal_init(config.init_std),
            bias=config.mlp_bias,
            skip_bias_add=True,
        )
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            place,
            inner,
            config.hidden_size,
            init=normal_init(config.output_init_std),
            bias=config.mlp_bias,
            skip_bias_add=True,
        )

    @property
    def output_bias(self) -> Tensor | None:
        """The bias that `forward` leaves to the caller."""
        return self.linear_fc2.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape, without the
        output bias.
        """
        inner = self.linear_fc1(x)
        bias = self.linear_fc1.bias
        flat = mlp_activation(inner.flatten(0, 1), bias, self.activation, self.gated)
        return self.linear_fc2(flat.view(*inner.shape[:2], -1))
