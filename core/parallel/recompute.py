"""Activation recompute: a function's activations are dropped and computed again in the backward
pass.

No random state is saved: dropout masks are hashes of arguments (see `random.py`), so the second
forward draws the same.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

R = TypeVar("R")


def recomputed(fn: Callable[..., R], *args: Any) -> R:
    """Call `fn(*args)`, keeping only its arguments for the backward pass (Chen et al., 2016)."""
    result: R = checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def recompute_module(module: nn.Module) -> None:
    """Make every later call of `module` in training drop its activations, without changing its
    name in the tree.
    """
    forward = module.forward
    loose: Any = module

    def call(*args: Any) -> Any:
        return recomputed(forward, *args) if module.training else forward(*args)

    loose.forward, loose.recomputes = call, True


def is_recomputed(module: nn.Module) -> bool:
    """Whether `recompute_module` has been applied."""
    return hasattr(module, "recomputes")
