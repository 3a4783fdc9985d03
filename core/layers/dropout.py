"""What a branch adds to the residual stream: bias, dropout, sum."""

import torch
from torch import Tensor, nn

from core.kernels.elementwise import add_bias, drop
from core.layers.norm import fork, takes_sum
from core.parallel.context import ParallelContext
from core.parallel.random import DropoutKey, key_words


class Dropout(nn.Module):
    """Dropout of a residual-stream tensor, with the same mask at every layout."""

    def __init__(self, ctx: ParallelContext, p: float, name: str) -> None:
        """Remember where it stands.

        Args:
            ctx: to find this rank's part of the sequence.
            p: probability of dropping an element.
            name: global name of this dropout, unique in the model.
        """
        super().__init__()
        self.ctx, self.p, self.name = ctx, p, name

    def is_on(self, key: DropoutKey | None) -> bool:
        """Whether `forward` drops anything."""
        return self.p > 0.0 and key is not None

    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to the same shape."""
        if key is None or not self.is_on(key):
            return x
        s, b, _ = x.shape
        first, length = 0, s
        if self.ctx.sequence_parallel:
            first, length = self.ctx.tp.rank * s, self.ctx.tp.size * s
        position = torch.arange(first, first + s, device=x.device)
        sample = torch.arange(key.first_sample, key.first_sample + b, device=x.device)
        rows = (sample[None, :] * length + position[:, None]).flatten()
        low, high = key_words(key.stream(self.name), x.device)
        return drop(x.flatten(0, 1), rows, low, high, self.p).view(x.shape)


class BiasDropoutAdd(nn.Module):
    """`residual + dropout(x + bias)`."""

    def __init__(self, ctx: ParallelContext, p: float, name: str) -> None:
        super().__init__()
        self.dropout = Dropout(ctx, p, name)

    def forward(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, key: DropoutKey | None
    ) -> Tensor:
        """All of `[s, b, h]`, or of `[s / tp, b, h]` under sequence parallelism; bias `[h]` or
        None.
        """
        if not self.dropout.is_on(key):
            flat = add_bias(x.flatten(0, 1), bias, residual.flatten(0, 1))
            return flat.view(residual.shape)
        return residual + self.dropout(x if bias is None else x + bias, key)

    def and_norm(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        key: DropoutKey | None,
        norm: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and its norm; a sum without dropout is left to a norm that takes
        sums.
        """
        if not self.dropout.is_on(key) and takes_sum(norm):
            total, normed = norm(residual, x, bias, True)
            return total, normed
        return fork(norm, self(x, bias, residual, key))
