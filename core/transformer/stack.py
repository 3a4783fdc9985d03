"""A run of layers of any kinds, given as a list of specs. Its modules are keyed by global layer
number, so names in checkpoints do not depend on which stage holds a layer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from core.config.parallel import RecomputeConfig
from core.config.transformer import TransformerConfig
from core.errors import ConfigError
from core.layers.forward_info import ForwardInfo
from core.parallel.placement import Placement
from core.parallel.recompute import Recompute
from core.spec import IDENTITY, ModuleSpec, build_module
from core.transformer.execution import Execution


@runtime_checkable
class RecomputableLayer(Protocol):
    """A layer that can recompute some of its modules."""

    def recompute_modules(self, names: Sequence[str], again: Recompute) -> None:
        """Recompute the named modules in training, by `again`."""


class LayerStack(nn.Module):
    """Layers one after another, then a final norm."""

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        name: str,
        layers: Mapping[int, ModuleSpec[Any]],
        final_norm: ModuleSpec[nn.Module] = IDENTITY,
        recompute: RecomputeConfig,
        execution: Execution | None = None,
    ) -> None:
        """Build the layers.

        Args:
            config: architecture.
            place: axes, format and device.
            name: global name of the stack, such as `decoder`.
            layers: global layer number to spec, in order.
            final_norm: norm after the last layer; IDENTITY on stages that do not end the stack.
            recompute: which activations are recomputed.
            execution: how the backend wants its layers run.

        Raises:
            ConfigError: a layer cannot recompute some of its modules, and is asked to.
        """
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                str(i): build_module(spec, config, place, name=f"{name}.layers.{i}")
                for i, spec in layers.items()
            }
        )
        self.final_norm = build_module(final_norm, place, config.hidden_size, config.norm_epsilon)
        self.recompute, self.execution = recompute, execution or Execution()
        if recompute.granularity == "selective":
            for i, layer in self.layers.items():
                if not isinstance(layer, RecomputableLayer):
                    raise ConfigError(
                        f"{name}.layers.{i} is a {type(layer).__name__}, which cannot recompute "
                        f"{' or '.join(recompute.modules)} alone: set "
                        "--parallel.recompute.granularity to full or none"
                    )
                layer.recompute_modules(recompute.modules, self.execution.recomputed)

    def forward(self, hidden: Tensor, info: ForwardInfo) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape."""
        layers = list(self.layers.values())
        groups = self._groups(layers) if self.training else [(layers, False)]
        with self.execution.around():
            for group, again in groups:
                if again:
                    hidden = self.execution.recomputed(_run, group, hidden, info)
                else:
                    hidden = _run(group, hidden, info)
        out: Tensor = self.final_norm(hidden)
        return out

    def _groups(self, layers: list[nn.Module]) -> list[tuple[list[nn.Module], bool]]:
        """Layers that run together, and whether their activations are recomputed."""
        n, config = self.recompute.num_layers, self.recompute
        if config.granularity != "full":
            return [(layers, False)]
        if config.method == "uniform":
            return [(layers[at : at + n], True) for at in range(0, len(layers), n)]
        return [([layer], True) for layer in layers[:n]] + [(layers[n:], False)]


def _run(layers: list[nn.Module], hidden: Tensor, info: ForwardInfo) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, info)
    return hidden
