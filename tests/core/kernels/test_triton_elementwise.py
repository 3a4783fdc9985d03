"""Triton kernels against the gradients that autograd finds in fp64: on a CPU under Triton's
interpreter, on a GPU compiled."""

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from core.kernels.elementwise import (
    Activation,
    _Activation,
    _Rotary,
    plain_mlp_activation,
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
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(3, 1030), (260, 8), (1, 7)])
def test_activation(
    tokens: int, width: int, biased: bool, gated: bool, kind: Activation, dtype: torch.dtype
) -> None:
    x = _random(tokens, (1 + gated) * width).to(dtype)
    dy = _random(tokens, width, seed=1).to(dtype)
    inputs = [x, _random(x.shape[1], seed=2).to(dtype)] if biased else [x]
    leaves = [y.clone().requires_grad_() for y in inputs]
    out = _Activation.apply(leaves[0], leaves[1] if biased else None, kind, gated)
    grads = torch.autograd.grad(out, leaves, dy)
    exact = [y.double().requires_grad_() for y in inputs]
    expected = plain_mlp_activation(exact[0], exact[1] if biased else None, kind, gated)
    expected_grads = torch.autograd.grad(expected, exact, dy.double())
    for found, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert found.dtype == dtype
        assert _error(found.detach(), wanted.detach()) < DTYPES[dtype]


@pytest.mark.parametrize("tokens", [1, 3, 7, 64])
def test_activation_cut_in_other_ways(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.kernels import triton_elementwise
    from core.kernels.triton_elementwise import ActivationLaunch, activation_backward

    monkeypatch.setattr(triton_elementwise, "_PROGRAMS", 1)
    x, bias, dy = _random(7, 80), _random(80, seed=1), _random(7, 40, seed=2)
    launch = ActivationLaunch(tokens=tokens, block=32, warps=1, stages=1)
    assert triton_elementwise._fitted(launch, bias, dy).tokens == min(tokens, 16)
    found = activation_backward(x, bias, dy, "gelu", True, launch)
    leaves = x.requires_grad_(), bias.requires_grad_()
    out = plain_mlp_activation(*leaves, "gelu", True)
    torch.testing.assert_close(found, torch.autograd.grad(out, leaves, dy))


@pytest.mark.parametrize("kind", get_args(Activation))
def test_activation_far_from_zero(kind: Activation) -> None:
    """Where exp overflows, the slope is 0 or 1 and not NaN; at 0 relu's is torch's."""
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    for gated, x in ((False, gate), (True, torch.cat((gate, torch.ones_like(gate)), 1))):
        leaf = x.clone().requires_grad_()
        _Activation.apply(leaf, None, kind, gated).sum().backward()
        assert leaf.grad is not None
        exact = leaf.detach().double().requires_grad_()
        plain_mlp_activation(exact, None, kind, gated).sum().backward()
        assert exact.grad is not None
        torch.testing.assert_close(leaf.grad.double(), exact.grad)


def test_activation_of_other_layouts() -> None:
    """A gradient that is expanded or transposed, and no tokens at all."""
    leaf, bias = _random(4, 12).requires_grad_(), _random(12, seed=1).requires_grad_()
    for weight in (torch.ones(1, 1, device=DEVICE).expand(4, 6), _random(6, 4).t()):
        out = _Activation.apply(leaf, bias, "silu", True)
        grads = torch.autograd.grad(out, (leaf, bias), weight)
        out = plain_mlp_activation(leaf, bias, "silu", True)
        torch.testing.assert_close(grads, torch.autograd.grad(out, (leaf, bias), weight))
    out = _Activation.apply(leaf[:0], bias, "silu", True)
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (leaf, bias)))


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
