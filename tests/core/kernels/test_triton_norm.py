"""Triton kernels against the plain functions in fp64: on a CPU under Triton's interpreter, on a GPU
compiled."""

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from core.kernels.elementwise import (
    _AddNorm,
    plain_add_norm,
    plain_layer_norm,
    plain_rms_norm,
)

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-5}
"""Largest error over the largest value. The interpreter truncates to bf16 where the GPU rounds."""
ARGUMENTS = ("hidden", "branch", "extra", "weight", "bias")


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.3).to(DEVICE)


def _arguments(shape: tuple[int, ...], absent: tuple[str, ...] = ()) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for i, name in enumerate(ARGUMENTS):
        size = shape if name in ("hidden", "branch") else shape[-1:]
        found[name] = None if name in absent else _random(*size, seed=i)
    return found


def _run(
    fn: Any, arguments: dict[str, Tensor | None], weights: list[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients where a weight says that an output is used."""
    leaves = {k: x if x is None else x.detach().requires_grad_() for k, x in arguments.items()}
    outs = fn(*leaves.values(), 1e-3)
    loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True) if w is not None)
    assert isinstance(loss, Tensor)
    given = [x for x in leaves.values() if x is not None]
    grads = torch.autograd.grad(loss, given, allow_unused=True)
    return list(outs), [torch.zeros(1) if g is None else g for g in grads]


def _map(fn: Any, arguments: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: None if x is None else fn(x) for k, x in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("added", ["branch", "branch and its bias", "nothing"])
@pytest.mark.parametrize("used", ["both", "total", "normed"])
def test_against_the_plain_function(used: str, added: str, bias: bool, dtype: torch.dtype) -> None:
    absent = [] if bias else ["bias"]
    absent += {"branch": ["extra"], "nothing": ["branch", "extra"]}.get(added, [])
    for shape in ((3, 1, 48), (1, 2, 1000)):
        arguments = _map(lambda x: x.to(dtype), _arguments(shape, tuple(absent)))
        weights: list[Tensor | None] = [_random(*shape, seed=8 + i).to(dtype) for i in range(2)]
        if used != "both":
            weights[used == "total"] = None
        outs, grads = _run(_AddNorm.apply, arguments, weights)
        wide = [None if w is None else w.double() for w in weights]
        exact, exact_grads = _run(plain_add_norm, _map(Tensor.double, arguments), wide)
        for actual, expected in zip([*outs, *grads], [*exact, *exact_grads], strict=True):
            assert actual.shape == expected.shape
            error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
            assert error < DTYPES[dtype]
        assert all(x.dtype == dtype for x in outs)


@pytest.mark.parametrize(
    "changes",
    [
        {"programs": 1},
        {"programs": 11, "block": 32},
        {"programs": 4, "stages": 2, "block": 32},
        {"programs": 2, "block": 64},
    ],
)
def test_more_tokens_than_programs(
    changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.kernels import triton_norm, triton_reduction

    arguments = _arguments((11, 1, 24))
    weights: list[Tensor | None] = [_random(11, 1, 24, seed=8 + i) for i in range(2)]
    expected = _run(plain_add_norm, arguments, weights)
    launch = replace(triton_norm.LAUNCH, **changes)
    default = triton_norm.backward
    monkeypatch.setattr(triton_norm, "backward", partial(default, launch=launch))
    # Sums of a few programs and a few columns, with a rest of each.
    monkeypatch.setattr(triton_reduction, "_ROWS_AT_A_TIME", 8)
    monkeypatch.setattr(triton_reduction, "_COLUMNS", 16)
    found = _run(_AddNorm.apply, arguments, weights)
    for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero() -> None:
    arguments = _map(lambda x: x.double(), _arguments((4, 1, 200), ("branch", "extra")))
    assert arguments["hidden"] is not None
    arguments["hidden"] = (arguments["hidden"] + 1000).float().double()
    weights: list[Tensor | None] = [None, _random(4, 1, 200, seed=8).double()]
    exact = _run(plain_add_norm, arguments, weights)
    found = _run(_AddNorm.apply, _map(Tensor.float, arguments), weights)
    for a, b in zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("heads", "width"), [(3, 20), (4, 16), (1, 24)])
def test_heads_of_a_fused_projection(heads: int, width: int, centred: bool) -> None:
    """Queries and keys are normed where they lie; other layouts are copied."""
    qkv = _random(5, 2, heads + 2, width, seed=1)
    weight, bias = _random(width, seed=2), _random(width, seed=3) if centred else None
    for x in (qkv[:, :, 1 : 1 + heads], qkv[:, :1, :heads], qkv[..., :heads, :].transpose(0, 1)):
        leaves = [x.detach().requires_grad_(), weight.requires_grad_()]
        leaves += [bias.requires_grad_()] if bias is not None else []
        out = _AddNorm.apply(leaves[0], None, None, weight, bias, 1e-3)[1]
        if bias is None:
            expected = plain_rms_norm(leaves[0], weight, 1e-3)
        else:
            expected = plain_layer_norm(leaves[0], weight, bias, 1e-3)
        torch.testing.assert_close(out, expected)
        dy = _random(*x.shape[::-1], seed=4).permute(3, 2, 1, 0)
        grads = torch.autograd.grad(out, leaves, dy), torch.autograd.grad(expected, leaves, dy)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_layouts_and_no_tokens() -> None:
    permuted = _random(6, 4, 1, seed=1).permute(1, 2, 0)
    arguments = _arguments((4, 1, 6))
    arguments["hidden"] = arguments["branch"] = permuted
    weights: list[Tensor | None] = [_random(4, 1, 6, seed=8), None]
    for length, used in itertools.product((4, 0), (0, 1)):
        some = {k: x[:length] if x is permuted else x for k, x in arguments.items()}
        weight = [None if i != used else weights[0][:length] for i in range(2)]  # type: ignore[index]
        found, expected = (_run(fn, some, weight) for fn in (_AddNorm.apply, plain_add_norm))
        for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
