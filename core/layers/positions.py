"""The table of learned positions. Legend: b batch, s sequence, h width."""

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.layers.embedding import table_rows
from core.parallel.cutting import whole_copy
from core.parallel.placement import Placement
from core.parallel.random import Init
from core.parallel.sharding import Declaration, GradKind


class LearnedPositions(nn.Module):
    """Table of position vectors, whole on every tp rank (Radford et al., "GPT", 2018)."""

    def __init__(self, place: Placement, positions: int, hidden_size: int, *, init: Init) -> None:
        """Declare the table `[positions, hidden_size]`."""
        super().__init__()
        self.ctx, self.positions, shape = place.ctx, positions, (positions, hidden_size)
        # Under sequence parallelism each rank looks up the positions of its own part of the
        # sequence.
        grad: GradKind = "partial" if place.ctx.sequence_parallel else "same"
        declaration = Declaration(shape, whole_copy(shape, grad), init)
        self.weight = place.declare(self, "weight", shape, declaration)

    def forward(self, length: int, positions: Tensor | None = None) -> Tensor:
        """The vectors to be added to those of a sequence's tokens. No communication.

        Args:
            length: s of the whole sequence.
            positions: int64 `[s]` or `[b, s]`; 0 to s - 1 by default, which a packed sequence and
                a piece of a longer one are not.

        Returns:
            `[s, 1, h]` or `[s, b, h]`; under sequence parallelism this rank's s / tp of them.

        Raises:
            ConfigError: the sequence is longer than the table. (Given positions are not looked at,
                since they may be on a GPU.)
        """
        if length > self.positions:
            raise ConfigError(
                f"a sequence of {length} tokens is longer than the model's {self.positions} "
                "learned positions: shorten it"
            )
        if positions is None:
            positions = torch.arange(length, device=self.weight.device)
        if self.ctx.sequence_parallel:
            positions = positions.chunk(self.ctx.tp.size, dim=-1)[self.ctx.tp.rank]
        rows = positions[:, None] if positions.dim() == 1 else positions.t().contiguous()
        return table_rows(rows, self.weight)
