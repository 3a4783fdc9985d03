"""Activation recompute: a function's activations are dropped and computed again in the backward
pass.

No random state is saved: dropout masks are hashes of arguments (see `random.py`), so the second
forward draws the same.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.utils.checkpoint import checkpoint

from core.spec import IdentityOp

R = TypeVar("R")

Recompute = Callable[..., Any]
"""Calls its first argument with the others, and again in the backward pass, as `recomputed`
does."""


def recomputed(fn: Callable[..., R], *args: Any) -> R:
    """Call `fn(*args)`, keeping only its arguments for the backward pass (Chen et al., 2016)."""
    result: R = checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def recompute_module(module: nn.Module, again: Recompute = recomputed) -> None:
    """Make every later call of `module` in training drop its activations, without changing its
    name in the tree.
    """
    forward = module.forward
    loose: Any = module

    def call(*args: Any) -> Any:
        return again(forward, *args) if module.training else forward(*args)

    loose.forward, loose.recomputes = call, True


def recompute_parts(
    parts: Mapping[str, Sequence[nn.Module]], names: Sequence[str], again: Recompute = recomputed
) -> None:
    """`recompute_module` for the parts of a layer under each of `names`; one that is absent is
    passed over.
    """
    for name in names:
        for module in parts[name]:
            if not isinstance(module, IdentityOp):
                recompute_module(module, again)


def is_recomputed(module: nn.Module) -> bool:
    """Whether `recompute_module` has been applied."""
    return hasattr(module, "recomputes")
