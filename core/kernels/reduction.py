"""Sums over whole tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

_CPU_CHUNK = 1 << 16


def sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """Sum of squares of all elements of tensors of one device: 0-dim, in fp64, the same in every
    run. Takes no fp64 copy of a tensor, which `torch.linalg.vector_norm` would.
    """
    if parts and parts[0].is_cuda:
        from core.kernels.triton_reduction import sum_of_squares as fused

        return fused(parts)
    return plain_sum_of_squares(parts)


def plain_sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """`sum_of_squares` on a CPU."""
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        for piece in part.reshape(-1).split(_CPU_CHUNK):
            total += piece.double().square().sum()
    return total
