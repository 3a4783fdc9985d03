"""What a kernel knows of the largest magnitudes of a matrix that it has written, for whoever else
would read the matrix again for the largest of all (FP8 scales).

It is kept on the matrix's storage, so that views of the whole, which autograd and layers make,
still find it, and so that it goes with the memory.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Written:
    """A matrix as it was when it had been written."""

    maxima: Tensor
    state: tuple[int, int, int, torch.dtype]


def _state(x: Tensor) -> tuple[int, int, int, torch.dtype]:
    """Changes with any operation of torch that changes the matrix, and with another part of it."""
    return x._version, int(x.storage_offset()), x.numel(), x.dtype


def remember(x: Tensor, maxima: Tensor) -> None:
    """Keep `maxima` for as long as the matrix is what it is.

    Args:
        x: contiguous. A kernel that torch knows nothing of must not change it later.
        maxima: fp32 `[m, n]`: the largest of them is that of the magnitudes in `x`, to the bit, NaN
            being larger than any.
    """
    if not x.is_inference():  # which has no version
        storage: Any = x.untyped_storage()
        storage.written = _Written(maxima, _state(x))


def maxima_of(x: Tensor) -> Tensor:
    """A matrix whose largest magnitude is that of `x`: what has been remembered, else `x` itself.

    Args:
        x: a matrix, contiguous.
    """
    written: _Written | None = getattr(x.untyped_storage(), "written", None)
    if written is None or x.is_inference() or written.state != _state(x):
        return x
    return written.maxima
