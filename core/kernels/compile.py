"""How the plain functions of this folder run: as they read on a CPU, compiled on CUDA."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

RECOMPILE_LIMIT = 64
"""Variants of one function by dtype, width and grad mode. torch's default of 8 is passed by one
model in training and evaluation with a query norm beside its other norms."""


def upcast(x: Tensor) -> Tensor:
    """At least fp32, and fp64 where the input is fp64, so that layouts can be proved equal in
    fp64.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def has_triton_twin(x: Tensor) -> bool:
    """Whether a hand-written kernel may take the place of a plain function: on CUDA, up to fp32."""
    return x.is_cuda and x.dtype.itemsize <= torch.float32.itemsize


def compiled(fn: Callable[P, R]) -> Callable[P, R]:
    """Compile `fn` for CUDA tensors; the first dimension of every tensor of two or more dimensions
    is dynamic.

    That dimension is the tokens or the sequence, so a new sequence length needs no new graph, while
    widths stay constants. One more graph at its second length needs the batch, where it is a
    dimension of its own (norms, rotary), and a vector of tokens (labels, rows): a vector is not
    marked, for it may be a weight.
    """

    @functools.cache
    def jit() -> Callable[..., R]:
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
        )
        return torch.compile(fn)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors: list[Any] = [x for x in args if isinstance(x, Tensor)]
        if not tensors or not tensors[0].is_cuda:
            return fn(*args, **kwargs)
        for x in tensors:
            if x.dim() >= 2:
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return jit()(*args, **kwargs)

    return call
