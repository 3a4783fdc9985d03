"""What layers make of a parameter, made once a step."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

R = TypeVar("R")


class StepCache:
    """Keeps what is made of parameters as long as they cannot change: from the start of a step to
    the end of its last backward pass.

    Whoever updates, loads or gathers parameters does so outside. There nothing is kept (evaluation
    makes it anew each time), and its memory is free.
    """

    def __init__(self) -> None:
        self._made: dict[int, Any] | None = None

    def open(self) -> None:
        """Keep from now on; a step starts."""
        self._made = {}

    def close(self) -> None:
        """Forget, and keep nothing."""
        self._made = None

    def get(self, parameter: nn.Parameter, make: Callable[[], R]) -> R:
        """What `make` returns, or what it returned for the parameter before."""
        if self._made is None:
            return make()
        if id(parameter) not in self._made:
            self._made[id(parameter)] = make()
        found: R = self._made[id(parameter)]
        return found


def derived(parameter: nn.Parameter, make: Callable[[], R]) -> R:
    """What is made of a parameter, one thing for each; made once a step if the data-parallel
    buffers gave the parameter a cache.
    """
    cache: StepCache | None = getattr(parameter, "derived", None)
    return make() if cache is None else cache.get(parameter, make)
