"""Where a weight's gradient goes: straight into its fp32 `main_grad` if the data-parallel buffers
gave it one.
"""

import torch
from torch import Tensor, nn


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
    _ready(weight)
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
    _ready(weight)
    return None


def accumulate_sum(bias: nn.Parameter, dy: Tensor) -> Tensor | None:
    """Add the sum of `dy` `[t, o]` over tokens to the gradient of a bias `[o]`; see
    `accumulate_product`.
    """
    main_grad: Tensor | None = getattr(bias, "main_grad", None)
    if main_grad is None:
        return dy.sum(0)
    main_grad.add_(dy.sum(0, dtype=main_grad.dtype))
    _ready(bias)
    return None


def _ready(parameter: nn.Parameter) -> None:
    parameter.grad_ready()  # type: ignore[attr-defined]  # set together with main_grad
