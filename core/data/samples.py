"""What a data set is to the loader."""

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Sample: TypeAlias = dict[str, Array]


class SampleDataset(Protocol):
    """Samples by number, the same in every process: position is one integer.

    A sample holds `tokens` [s] int64, `labels` [s] int64 and `loss_mask` [s] bool; `labels[i]` is
    the token after `tokens[i]`. Where attention must not cross from one document to another it also
    holds `cu_seqlens` [n + 1] int32, where its n documents begin, and s.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def next_token_sample(text: Array) -> Sample:
    """Cut `text` [s + 1] int64 into inputs and the labels one to the right, all of them counted."""
    return {
        "tokens": text[:-1],
        "labels": text[1:],
        "loss_mask": np.ones(len(text) - 1, dtype=np.bool_),
    }


def check_index(index: int, length: int) -> None:
    """Raise IndexError unless 0 <= index < length."""
    if not 0 <= index < length:
        raise IndexError(f"sample {index} of a data set of {length}")
