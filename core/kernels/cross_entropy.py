"""Cross entropy over a vocabulary that is cut over the tensor-parallel axis.

Exchanges of four numbers a token replace a gather of the logits (Megatron-LM's scheme). The
forward pass keeps the logits and two numbers a token; the backward pass writes the gradient over
the logits. Legend: t tokens, v local vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.kernels.compile import compiled, has_triton_twin, upcast
from core.parallel.collectives import all_reduce
from core.parallel.context import Axis


@dataclass(frozen=True)
class VocabSlice:
    """Which part of the vocabulary the columns of the logits are."""

    axis: Axis
    """The axis over which the vocabulary is cut."""
    first: int
    """Token of column 0."""
    valid: int
    """Columns that are tokens; those after them are padding and count for nothing."""
    total: int
    """Size of the whole vocabulary."""


def _masked(logits: Tensor, valid: int) -> Tensor:
    wide = upcast(logits)
    if valid == logits.shape[-1]:
        return wide
    columns = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(columns < valid, wide, -math.inf)


def _row_statistics(logits: Tensor, valid: int, total: bool) -> Tensor:
    if has_triton_twin(logits):
        from core.kernels.triton_cross_entropy import row_statistics

        return row_statistics(logits, valid, total)
    return plain_row_statistics(logits, valid)


@compiled
def plain_row_statistics(logits: Tensor, valid: int) -> Tensor:
    """`[t, 3]` of each row's valid columns: the maximum, the sum of exp and the sum of the logits,
    both less that maximum (less nothing where it is minus infinity).
    """
    masked = _masked(logits, valid)
    highest = masked.amax(dim=-1)
    shifted = masked - _finite(highest)[:, None]
    tokens = torch.arange(logits.shape[-1], device=logits.device) < valid
    total = torch.where(tokens, shifted, 0.0).sum(-1)
    return torch.stack((highest, shifted.exp().sum(-1), total), dim=-1)


def _finite(highest: Tensor) -> Tensor:
    return torch.where(highest == -math.inf, 0.0, highest)


@compiled
def _partial_sums(
    logits: Tensor, labels: Tensor, statistics: Tensor, highest: Tensor, part: tuple[int, int]
) -> Tensor:
    """`[3, t]`: sum of exp, the label's logit where this rank has it, sum of logits, all less the
    row's maximum over the whole vocabulary.

    statistics: `[t, 3]` of this rank's columns. part: first token and number of valid columns.
    """
    first, valid = part
    own, sum_exp, total = statistics.unbind(-1)
    local = labels - first
    here = (local >= 0) & (local < valid)
    target = upcast(logits.gather(-1, torch.where(here, local, 0)[:, None])[:, 0]) - highest
    return torch.stack(
        (
            sum_exp * (own - highest).exp(),
            torch.where(here, target, 0.0),
            total + valid * (_finite(own) - highest),
        )
    )


def _write_gradient(logits: Tensor, *rest: Any) -> None:
    if has_triton_twin(logits):
        from core.kernels.triton_cross_entropy import write_gradient

        write_gradient(logits, *rest)
    else:
        plain_write_gradient(logits, *rest)


@compiled
def plain_write_gradient(
    logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    scale: Tensor,
    part: tuple[int, int],
    smoothing: tuple[float, float],
) -> None:
    """Overwrite the logits by `scale * (softmax - target distribution)`; padding columns get zero.

    statistics: `[t, 2]`, each row's maximum and the logarithm of its sum of exp less that maximum;
    apart, since their sum would round large logits. part: first token and number of valid columns.
    smoothing: epsilon, and epsilon / vocabulary.
    """
    first, valid = part
    columns = torch.arange(logits.shape[-1], device=logits.device)
    hit = columns[None, :] == (labels - first)[:, None]
    # Not `where` of two numbers: that is fp32 even in fp64.
    target = hit.to(statistics.dtype) * (1.0 - smoothing[0]) + smoothing[1]
    highest, log_sum = statistics.split(1, dim=-1)
    probability = (_masked(logits, valid) - highest - log_sum).exp()
    gradient = (probability - target) * scale[:, None]
    logits.copy_(torch.where(columns < valid, gradient, 0.0))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, part: VocabSlice, label_smoothing: float
    ) -> Tensor:
        statistics = _row_statistics(logits, part.valid, label_smoothing != 0.0)
        highest = all_reduce(statistics[:, 0].clone(), part.axis, dist.ReduceOp.MAX)
        columns = part.first, part.valid
        sums = _partial_sums(logits, labels, statistics, highest, columns)
        sum_exp, target, total = all_reduce(sums, part.axis)
        log_sum = sum_exp.log()
        ctx.save_for_backward(logits, labels, torch.stack((highest, log_sum), dim=-1))
        ctx.part, ctx.smoothing = part, (label_smoothing, label_smoothing / part.total)
        loss = log_sum - (1.0 - label_smoothing) * target
        return loss - ctx.smoothing[1] * total if label_smoothing else loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, statistics = ctx.saved_tensors
        part: VocabSlice = ctx.part
        scale = grads[0].contiguous()
        logits = logits.detach()
        _write_gradient(logits, labels, statistics, scale, (part.first, part.valid), ctx.smoothing)
        return logits, None, None, None


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, part: VocabSlice, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of every token.

    The target distribution gives epsilon / vocabulary to every token and the rest to the label, as
    torch's own does, over the whole vocabulary and not this rank's part of it. Two all-reduces
    over `part.axis`.

    Args:
        logits: `[t, v]`; overwritten by its gradient in the backward pass, so nothing else may
            keep it.
        labels: int64 `[t]`, tokens of the whole vocabulary.
        part: what the columns are.
        label_smoothing: epsilon.

    Returns:
        `[t]` in at least fp32, the same on all ranks of the axis.
    """
    return _VocabParallelCrossEntropy.apply(logits, labels, part, label_smoothing)
