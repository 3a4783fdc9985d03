"""What is compared: one row per work. A new one is one row here, of any family's preset."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from core.config.suggestions import did_you_mean
from core.config.transformer import TransformerConfig
from core.errors import ConfigError
from models.registry import family_for_preset


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, cut to some layers, and one step's tokens."""

    name: str
    """As on the command line."""
    preset: str
    """Architecture."""
    layers: int
    """Layers kept of it."""
    vocab_size: int | None = None
    """Tokens, where other than the architecture's."""
    seq_length: int
    """Tokens per sample."""
    micro_batch_size: int
    """Samples per microbatch."""
    microbatches: int
    """Microbatches per step."""
    gib: float
    """Device memory that the most frugal contestant needs: two of them are resident together only
    where twice as much is there."""
    memory_lean: bool = False
    """Ours with 16-bit remainders in place of fp32 masters, and bf16 moments. Peers have another
    precision contract, so this work has none."""

    def config(self) -> TransformerConfig:
        """The architecture."""
        preset: TransformerConfig = family_for_preset(self.preset).presets()[self.preset]()
        vocabulary = self.vocab_size or preset.vocab_size
        return dataclasses.replace(preset, num_layers=self.layers, vocab_size=vocabulary)

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.microbatches * self.micro_batch_size * self.seq_length


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        work.name: work
        for work in (
            Workload(
                name="dense8b",
                preset="llama3-8b",
                layers=8,
                seq_length=8192,
                micro_batch_size=1,
                microbatches=4,
                gib=61.0,
            ),
            Workload(
                name="dense1b",
                preset="llama3.2-1b",
                layers=16,
                seq_length=4096,
                micro_batch_size=2,
                microbatches=4,
                gib=36.0,
            ),
            Workload(
                name="full8b",
                preset="llama3-8b",
                layers=32,
                seq_length=8192,
                micro_batch_size=1,
                microbatches=4,
                gib=129.0,
                memory_lean=True,
            ),
            # Of GPT-3 1.3B: learned positions, LayerNorm, GELU, biases.
            Workload(
                name="gpt",
                preset="gpt3-1.3b",
                layers=24,
                vocab_size=50304,
                seq_length=2048,
                micro_batch_size=8,
                microbatches=1,
                gib=56.0,
            ),
            # To try the comparison itself, on a CPU too.
            Workload(
                name="tiny",
                preset="tiny",
                layers=2,
                seq_length=64,
                micro_batch_size=2,
                microbatches=2,
                gib=0.1,
            ),
        )
    }
)
"""Every work by name."""


def workload(name: str) -> Workload:
    """The work of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"there is no work {name}: {did_you_mean(name, WORKLOADS)}")
    return WORKLOADS[name]
