"""What all layers of one forward pass are told beside their input."""

from dataclasses import dataclass

from torch import Tensor

from core.generation.cache import KeyValueCache
from core.kernels.masked_attention import Documents
from core.parallel.random import DropoutKey


@dataclass(frozen=True)
class ForwardInfo:
    """Passed through every layer of one forward pass; a layer takes from it what it needs."""

    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin over the whole sequence, `[s, r]`, or `[s, b, r]` where positions differ from row
    to row."""
    key: DropoutKey | None = None
    """What makes dropout masks; None in evaluation."""
    encoded: Tensor | None = None
    """What cross-attention sees: an encoder's output, `[z, b, h]` (`[z / tp, b, h]` under sequence
    parallelism)."""
    documents: Documents | None = None
    """What self-attention must not cross, where rows hold several documents."""
    cache: KeyValueCache | None = None
    """Keys and values of the tokens before these, in generation."""
