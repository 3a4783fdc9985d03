"""Where a weight's gradient goes: straight into its fp32 `main_grad` if the data-parallel buffers
gave it one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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


def accumulate_product(weight: nn.Parameter, dy: Tensor, x: Tensor) -> Tensor | None:
    """Add `dy^T x`, the gradient of a linear layer's weight, to the weight's gradient.

    With a `main_grad` the sum is accumulated inside the GEMM (on CUDA in fp32 for 16-bit inputs;
    what Megatron-LM does with an APEX kernel), `grad_ready` is called and nothing is returned to
    autograd. Without one the product is returned as an ordinary gradient.

    Args:
        weight: `[o, i]`.
        dy: `[t, o]`.
        x: `[t, i]`.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return dy.t() @ x
    if dy.is_cuda and dy.dtype != main_grad.dtype:
        torch.addmm(main_grad, dy.t(), x, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(dy.t().to(main_grad.dtype), x.to(main_grad.dtype))
    say_ready(weight)
    return None


def accumulate_rows(weight: nn.Parameter, rows: Tensor, values: Tensor) -> Tensor | None:
    """Add `values` `[t, h]` to rows `[t]` of the gradient of a table `[v, h]`; see
    `accumulate_product`.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        # In a 16-bit sum the frequent rows would lose most of what is added to them.
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        return total.index_add_(0, rows, values.to(wide)).to(weight.dtype)
    main_grad.index_add_(0, rows, values.to(main_grad.dtype))
    say_ready(weight)
    return None


def accumulate_sum(bias: nn.Parameter, dy: Tensor) -> Tensor | None:
    """Add the sum of `dy` `[t, o]` over tokens to the gradient of a bias `[o]`; see
    `accumulate_product`.
    """
    main_grad: Tensor | None = getattr(bias, "main_grad", None)
    if main_grad is None:
        return dy.sum(0)
    main_grad.add_(dy.sum(0, dtype=main_grad.dtype))
    say_ready(bias)
    return None


def say_ready(parameter: nn.Parameter) -> None:
    """Say that a whole gradient has been added to the `main_grad` of a parameter that has one."""
    parameter.grad_ready()  # type: ignore[attr-defined]  # set together with main_grad
