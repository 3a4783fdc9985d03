"""What a run changes in the process that it has to itself."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def use_deterministic_kernels() -> None:
    """Have torch choose kernels that give the same bits every time; before the first of them."""
    # cuBLAS reads this when a process first uses it, and sums in no fixed order without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


@contextmanager
def controlled_garbage_collection(interval: int) -> Iterator[None]:
    """Turn Python's collector off, so that ranks do not pause one after the other; the loop calls
    it instead. What exists already is never looked at again. With interval 0, do nothing.
    """
    if not interval or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
