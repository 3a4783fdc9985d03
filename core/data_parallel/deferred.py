"""Weight gradients that a pipeline schedule computes apart from input gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


class DeferredProducts:
    """Puts the products that make weight gradients off until they are asked for, which a pipeline
    does when it has nothing more urgent (Qi et al., "Zero Bubble Pipeline Parallelism", 2023).
    """

    def __init__(self) -> None:
        self._open: list[Callable[[], None]] | None = None

    @contextmanager
    def collect(self) -> Iterator[list[Callable[[], None]]]:
        """Put off what backward passes inside would compute; the caller runs the list later, once,
        from its first entry to its last.
        """
        assert self._open is None, "a backward pass inside a backward pass"
        self._open = []
        try:
            yield self._open
        finally:
            self._open = None

    def take(self, product: Callable[[], None]) -> bool:
        """Whether the product has been put off."""
        if self._open is None:
            return False
        self._open.append(product)
        return True


def put_off(weight: nn.Parameter, product: Callable[[], None]) -> bool:
    """Put a product off that adds to the gradient of a weight, if that is asked for now.

    A product may communicate: all ranks of an axis run the same schedule.
    """
    deferred: DeferredProducts | None = getattr(weight, "deferred", None)
    return deferred is not None and deferred.take(product)
