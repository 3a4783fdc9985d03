"""What a layer's attention is, whatever the batch: who sees whom, and its dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.parallel.random import DropoutKey


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys a query sees, and how scores are scaled."""

    causal: bool
    scale: float
    window: int | None = None
    """causal only: a query sees itself and this many keys less one before it."""

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError(f"window {self.window} needs causal attention: set causal")

    def window_for(self, keys: int) -> int | None:
        """The window where it hides anything at all."""
        return self.window if self.window is not None and self.window < keys else None


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout on attention weights."""

    p: float
    key: DropoutKey
    name: str
    """Global name of this dropout, unique in the model."""
    first_head: int
    """Global index of this rank's first query head."""
    total_heads: int
    """Query heads of the whole layer."""


def visible(pattern: AttentionPattern, query: Tensor, z: int) -> Tensor:
    """Boolean `[..., s, z]`, true where queries at positions `[..., s]` see keys 0 to z - 1."""
    query, key = query[..., None], torch.arange(z, device=query.device)
    if not pattern.causal:
        return torch.ones_like(query + key, dtype=torch.bool)
    seen = query >= key
    window = pattern.window_for(z)
    return seen if window is None else seen & (query - key < window)
