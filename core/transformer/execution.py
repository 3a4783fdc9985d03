"""How a stack of layers is run, where the backend that made them has a say in it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from core.parallel.recompute import Recompute, recomputed


@dataclass(frozen=True)
class Execution:
    """By default layers are simply called."""

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes what is entered around every forward pass of the stack."""
    recomputed: Recompute = recomputed
    """How activations are recomputed."""
