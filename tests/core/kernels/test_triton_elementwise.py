"""Triton kernels against the gradients that autograd finds in fp64: on a CPU under Triton's
interpreter, on a GPU compiled."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from core.kernels.elementwise import (
    Activation,
    _GatedActivation,
    _Rotary,
    plain_gated_activation,
    plain_rotary,
)

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


def _turned(fn: Any, qkv: Tensor, counts: tuple[int, int], tables: tuple[Tensor, ...]) -> Any:
    """Queries and keys of a fused projection turned, and its gradient."""
    leaf = qkv.detach().requires_grad_()
    q, k, _ = leaf.split([*counts, qkv.shape[2] - sum(counts)], dim=2)
    outs = fn(q, k, *tables)
    # In the order [b, n, s, d], as attention may return them.
    dys = [
        _random(*(x.shape[i] for i in (1, 2, 0, 3)), seed=5 + j).permute(2, 0, 1, 3)
        for j, x in enumerate(outs)
    ]
    (grad,) = torch.autograd.grad(outs, leaf, [dy.to(qkv.dtype) for dy in dys])
    return [*outs, grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(
    ("counts", "size", "rotated"), [((4, 2), 16, 16), ((5, 1), 24, 10), ((3, 3), 12, 12)]
)
def test_rotary(
    counts: tuple[int, int], size: int, rotated: int, by_row: bool, dtype: torch.dtype
) -> None:
    """The halves of the tables differ, which those of the model do not."""
    for batch in (1, 2):
        qkv = _random(3, batch, sum(counts) + counts[1], size).to(dtype)
        shape = (3, batch, rotated) if by_row else (3, rotated)
        tables = _random(*shape, seed=1).cos(), _random(*shape, seed=2).sin()
        found = _turned(_Rotary.apply, qkv, counts, tables)
        wide = _turned(plain_rotary, qkv.double(), counts, tuple(x.double() for x in tables))
        for actual, expected in zip(found, wide, strict=True):
            assert actual.dtype == dtype
            assert actual.shape == expected.shape
            assert _error(actual.detach(), expected.detach()) < DTYPES[dtype]


def test_rotary_in_fp32_is_the_plain_one() -> None:
    qkv = _random(4, 2, 6, 16)
    tables = _random(4, 8, seed=1).cos(), _random(4, 8, seed=2).sin()
    found, expected = (_turned(fn, qkv, (4, 1), tables) for fn in (_Rotary.apply, plain_rotary))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_rotary_by_a_few_heads_at_a_time(heads: int) -> None:
    from core.kernels.triton_elementwise import RotaryLaunch, turn

    q, k = _random(3, 2, 5, 12), _random(3, 2, 3, 12, seed=1)
    tables = (
        _random(3, 2, 8, seed=1).transpose(0, 1)[:, :1].expand(2, 3, 8).transpose(0, 1),
        (_random(3, 2, 8, seed=2)),
    )
    found = turn(q, k, *tables, launch=RotaryLaunch(heads=heads))
    torch.testing.assert_close(found, plain_rotary(q, k, *tables), rtol=1e-6, atol=1e-6)


def test_rotary_of_no_tokens() -> None:
    q, k, table = _random(0, 2, 4, 8), _random(0, 2, 2, 8), _random(0, 8)
    assert [x.shape for x in _Rotary.apply(q, k, table, table)] == [q.shape, k.shape]
