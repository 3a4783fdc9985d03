"""Triton kernels against the gradients that autograd finds in fp64: on a CPU under Triton's
interpreter, on a GPU compiled."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from core.kernels.elementwise import Activation, _GatedActivation, plain_gated_activation

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Largest error over the largest value. The interpreter truncates to bf16 where the GPU rounds."""


def _random(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", get_args(Activation))
@pytest.mark.parametrize(("tokens", "width"), [(3, 1030), (5, 8), (1, 7)])
def test_gated_activation(kind: Activation, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, dy = _random(tokens, 2 * width).to(dtype), _random(tokens, width, seed=1).to(dtype)
    leaf = x.clone().requires_grad_()
    out = _GatedActivation.apply(leaf, kind)
    (grad,) = torch.autograd.grad(out, leaf, dy)
    assert out.dtype == grad.dtype == dtype
    exact = x.double().requires_grad_()
    expected = plain_gated_activation(exact, None, kind)
    (expected_grad,) = torch.autograd.grad(expected, exact, dy.double())
    assert _error(out.detach(), expected.detach()) < DTYPES[dtype]
    assert _error(grad, expected_grad) < DTYPES[dtype]


@pytest.mark.parametrize("kind", get_args(Activation))
def test_gated_activation_far_from_zero(kind: Activation) -> None:
    """Where exp overflows, the slope is 0 or 1 and not NaN; at 0 relu's is torch's."""
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    leaf = torch.cat((gate, torch.ones_like(gate)), 1).requires_grad_()
    _GatedActivation.apply(leaf, kind).sum().backward()
    assert leaf.grad is not None
    exact = leaf.detach().double().requires_grad_()
    plain_gated_activation(exact, None, kind).sum().backward()
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad)


def test_gated_activation_of_other_layouts() -> None:
    """A gradient that is expanded or transposed, and no tokens at all."""
    leaf = _random(4, 12).requires_grad_()
    for weight in (torch.ones(1, 1, device=DEVICE).expand(4, 6), _random(6, 4).t()):
        (grad,) = torch.autograd.grad(_GatedActivation.apply(leaf, "silu"), leaf, weight)
        (expected,) = torch.autograd.grad(plain_gated_activation(leaf, None, "silu"), leaf, weight)
        torch.testing.assert_close(grad, expected)
    (grad,) = torch.autograd.grad(_GatedActivation.apply(leaf[:0], "silu").sum(), leaf)
    assert not grad.any()
