"""Where a weight's gradient goes: straight into its fp32 `main_grad` if the data-parallel buffers
gave it one.

A gradient that comes from products is not cleared between steps: it goes stale, and the first
product of the next step overwrites it, which saves a write and a read of the whole buffer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.kernels.embedding import add_rows


def accumulate_product(weight: nn.Parameter, dy: Tensor, x: Tensor) -> Tensor | None:
    """Add `dy^T x`, the gradient of a linear layer's weight, to the weight's gradient.

    With a `main_grad` the sum is accumulated inside the GEMM (on CUDA in fp32 for 16-bit inputs;
    what Megatron-LM does with an APEX kernel), or written by it where the gradient is stale;
    `grad_ready` is called and nothing is returned to autograd. Without one the product is returned
    as an ordinary gradient.

    Args:
        weight: `[o, i]`.
        dy: `[t, o]`.
        x: `[t, i]`.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return dy.t() @ x
    # With 0 nothing is read, not even NaN.
    beta = 0 if _take_stale(weight) else 1
    weight.from_products = True  # type: ignore[attr-defined]
    if dy.is_cuda and dy.dtype != main_grad.dtype:
        torch.addmm(main_grad, dy.t(), x, beta=beta, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(dy.t().to(main_grad.dtype), x.to(main_grad.dtype), beta=beta)
    say_ready(weight)
    return None


def accumulate_gradient(
    weight: nn.Parameter,
    product: Callable[[Tensor | None], Tensor],
    add: Callable[[Tensor], None],
) -> Tensor | None:
    """`accumulate_product` with a product of another kind.

    Args:
        weight: `[o, i]`.
        product: makes the gradient, and puts it into its argument if it is given one.
        add: adds the gradient to its argument.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return product(None)
    if _take_stale(weight):
        product(main_grad)
    else:
        add(main_grad)
    weight.from_products = True  # type: ignore[attr-defined]
    say_ready(weight)
    return None


def accumulate_rows(weight: nn.Parameter, rows: Tensor, values: Tensor) -> Tensor | None:
    """Add `values` `[t, h]` to rows `[t]` of the gradient of a table `[v, h]`; see
    `accumulate_product`. Rows of other ranks' tables are dropped.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        # In a 16-bit sum the frequent rows would lose most of what is added to them.
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(weight.shape, dtype=wide, device=weight.device)
        add_rows(total, rows, values)
        return total.to(weight.dtype)
    settle(weight)
    add_rows(main_grad, rows, values)
    say_ready(weight)
    return None


def accumulate_sum(bias: nn.Parameter, dy: Tensor) -> Tensor | None:
    """Add the sum of `dy` `[t, o]` over tokens to the gradient of a bias `[o]`; see
    `accumulate_product`.
    """
    main_grad: Tensor | None = getattr(bias, "main_grad", None)
    if main_grad is None:
        return dy.sum(0)
    settle(bias)
    main_grad.add_(dy.sum(0, dtype=main_grad.dtype))
    say_ready(bias)
    return None


def expire(parameter: nn.Parameter) -> None:
    """End the life of a gradient: stale if products make it, else zero. Nothing but the functions
    of this module may add to a stale one.
    """
    loose: Any = parameter
    if hasattr(parameter, "from_products"):
        loose.stale = True
    else:
        loose.main_grad.zero_()


def settle(parameter: nn.Parameter) -> None:
    """Clear a gradient that is stale still, before something other than a product is added, or
    where nothing came.
    """
    loose: Any = parameter
    if _take_stale(parameter):
        loose.main_grad.zero_()


def _take_stale(parameter: nn.Parameter) -> bool:
    loose: Any = parameter
    stale, loose.stale = getattr(parameter, "stale", False), False
    return stale


def say_ready(parameter: nn.Parameter) -> None:
    """Say that a whole gradient has been added to the `main_grad` of a parameter that has one."""
    parameter.grad_ready()  # type: ignore[attr-defined]  # set together with main_grad
