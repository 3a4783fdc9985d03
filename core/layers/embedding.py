"""Token embedding and output head, both cut over the vocabulary.

Legend: b batch, s sequence, v local rows, h width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.data_parallel.main_grad import accumulate_rows
from core.kernels.cross_entropy import VocabSlice
from core.kernels.embedding import look_up
from core.layers.linear import Plan, parallel_linear
from core.parallel.collectives import reduce_from, reduce_scatter_sequence
from core.parallel.cutting import split_vocab
from core.parallel.placement import Placement
from core.parallel.random import Init
from core.parallel.sharding import Declaration, GradKind


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: nn.Parameter, first: int) -> Tensor:
        rows = tokens - first
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return look_up(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (rows,) = ctx.saved_tensors
        return None, accumulate_rows(ctx.weight, rows.flatten(), grads[0].flatten(0, -2)), None


def table_rows(tokens: Tensor, weight: nn.Parameter, first: int = 0) -> Tensor:
    """`[..., h]` of a table `[v, h]` for int64 `[...]`, counted from `first`; zeros for what it
    does not have.
    """
    out: Tensor = _Lookup.apply(tokens, weight, first)
    return out


def vocab_parallel_parameter(
    module: nn.Module,
    place: Placement,
    vocab_size: int,
    hidden_size: int,
    init: Init,
    across: str | None = None,
) -> tuple[nn.Parameter, VocabSlice]:
    """Declare `module.weight`, this rank's rows of a `[vocab_size, hidden_size]` table.

    With `across`, its global name, it is the table of an embedding and a head on different pieces
    of a pipeline, each of which has a part of the gradient.
    """
    axis = place.ctx.tp
    grad: GradKind = "same" if across is None else "partial"
    rows, copies = split_vocab(vocab_size, axis.rank, axis.size, hidden_size, grad)
    declaration = Declaration(
        (vocab_size, hidden_size),
        copies,
        init,
        global_name=across,
        across_stages=across is not None,
    )
    weight = place.declare(module, "weight", (rows, hidden_size), declaration)
    valid = copies[0].local.shape[0] if copies else 0
    return weight, VocabSlice(axis, axis.rank * rows, valid, vocab_size)


class VocabParallelEmbedding(nn.Module):
    """Table of token vectors whose rows are cut over tp and padded to a common size."""

    def __init__(
        self,
        place: Placement,
        vocab_size: int,
        hidden_size: int,
        *,
        init: Init,
        across: str | None = None,
    ) -> None:
        """Declare the table; for `across` see `vocab_parallel_parameter`."""
        super().__init__()
        self.sequence_parallel = place.ctx.sequence_parallel
        self.weight, self.part = vocab_parallel_parameter(
            self, place, vocab_size, hidden_size, init, across
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up and sum over tp (all-reduce, or reduce-scatter under sequence
        parallelism).

        Args:
            tokens: int64 `[b, s]`.

        Returns:
            `[s, b, h]`, or `[s / tp, b, h]` under sequence parallelism.
        """
        hidden = table_rows(tokens.t().contiguous(), self.weight, self.part.first)
        reduce = reduce_scatter_sequence if self.sequence_parallel else reduce_from
        return reduce(hidden, self.part.axis)


class VocabParallelHead(nn.Module):
    """Hidden states to logits of this rank's part of the vocabulary; its weight may be the
    embedding's (tied).
    """

    def __init__(
        self,
        place: Placement,
        vocab_size: int,
        hidden_size: int,
        *,
        init: Init,
        tied_to: VocabParallelEmbedding | None = None,
        across: str | None = None,
    ) -> None:
        """Declare the weight, or take that of `tied_to`; for `across` see
        `vocab_parallel_parameter`.
        """
        super().__init__()
        if tied_to is None:
            self.weight, self.part = vocab_parallel_parameter(
                self, place, vocab_size, hidden_size, init, across
            )
        else:
            self.weight, self.part = tied_to.weight, tied_to.part
        self.plan = Plan.of(place.ctx, "output")

    def forward(self, hidden: Tensor) -> Tensor:
        """`[s, b, h]` (`[s / tp, b, h]` under sequence parallelism) to logits `[s, b, v]`, padding
        columns last.
        """
        return parallel_linear(hidden, self.weight, None, self.plan)
