"""A Triton kernel for the gradient norm. Imported on CUDA only."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

jit: Callable[[Callable[..., Any]], Any] = triton.jit

_BLOCK, _ROUNDS = 1024, 16
"""Two wide loads of four fp32 elements for each thread of four warps, so many times."""


@jit
def _sum_of_squares(
    x: tl.tensor, out: tl.tensor, numel: tl.tensor, BLOCK: tl.constexpr, ROUNDS: tl.constexpr
) -> None:
    """One program: BLOCK * ROUNDS elements, to one number."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    sums = tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(ROUNDS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float64)
        sums += value * value
    tl.store(out + tl.program_id(0), tl.sum(sums))


def sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    """`core.kernels.reduction.sum_of_squares`.

    Every lane adds in fp64: at one conversion and one multiplication an element these GPUs are
    still faster than their memory, while squares in fp32 could overflow. Blocks are summed in a
    fixed order, without atomics.
    """
    sizes = [triton.cdiv(part.numel(), _BLOCK * _ROUNDS) for part in parts]
    sums = torch.empty(sum(sizes), dtype=torch.float64, device=parts[0].device)
    for part, out in zip(parts, sums.split(sizes), strict=True):
        if part.numel():
            _sum_of_squares[len(out),](part.contiguous(), out, part.numel(), _BLOCK, _ROUNDS)
    return sums.sum()
