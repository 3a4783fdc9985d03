"""Triton kernels against the plain functions in fp64: on a CPU under Triton's interpreter, on a GPU
compiled."""

import pytest
import torch
from torch import Tensor

from core.kernels.elementwise import _AddRMSNorm, plain_add_rms_norm

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-5}
"""Largest error over the largest value. The interpreter truncates to bf16 where the GPU rounds."""


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.3).to(DEVICE)


def _run(
    fused: bool, leaves: list[Tensor], weights: list[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients where a weight says that an output is used."""
    hidden, weight, *branch = [x.detach().requires_grad_() for x in leaves]
    fn = _AddRMSNorm.apply if fused else plain_add_rms_norm
    outs = fn(hidden, branch[0] if branch else None, weight, 1e-3)
    loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True) if w is not None)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, [hidden, weight, *branch], allow_unused=True)
    return list(outs), [torch.zeros(1) if g is None else g for g in grads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("used", ["both", "total", "normed"])
@pytest.mark.parametrize("shape", [(5, 1, 48), (3, 2, 1000)])
def test_against_the_plain_function(
    shape: tuple[int, ...], used: str, added: bool, dtype: torch.dtype
) -> None:
    leaves = [_random(*shape, seed=1), _random(shape[-1], seed=2)]
    leaves += [_random(*shape, seed=3)] if added else []
    leaves = [x.to(dtype) for x in leaves]
    weights: list[Tensor | None] = [_random(*shape, seed=4).to(dtype) for _ in range(2)]
    if used != "both":
        weights[used == "total"] = None
    outs, grads = _run(True, leaves, weights)
    exact, exact_grads = _run(
        False, [x.double() for x in leaves], [None if w is None else w.double() for w in weights]
    )
    for actual, expected in zip([*outs, *grads], [*exact, *exact_grads], strict=True):
        assert actual.shape == expected.shape
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
        assert error < DTYPES[dtype]
    assert all(x.dtype == dtype for x in outs)


def test_more_tokens_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.kernels import triton_norm

    leaves = [_random(11, 1, 24, seed=1), _random(24, seed=2), _random(11, 1, 24, seed=3)]
    weights: list[Tensor | None] = [_random(11, 1, 24, seed=4), _random(11, 1, 24, seed=5)]
    expected = _run(False, leaves, weights)
    for programs in (1, 4, 11):
        monkeypatch.setattr(triton_norm, "_PROGRAMS", programs)
        found = _run(True, leaves, weights)
        for a, b in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_other_layouts_and_no_tokens() -> None:
    weight = _random(6, seed=2).requires_grad_()
    hidden = _random(6, 4, 1, seed=1).permute(1, 2, 0).requires_grad_()
    for x in (hidden, hidden[:0]):
        total, normed = _AddRMSNorm.apply(x, x, weight, 1e-3)
        expected = plain_add_rms_norm(x, x, weight, 1e-3)
        torch.testing.assert_close((total, normed), expected)
        grads = torch.autograd.grad(normed.sum() + total.sum(), [hidden, weight])
        exact = torch.autograd.grad(expected[0].sum() + expected[1].sum(), [hidden, weight])
        torch.testing.assert_close(grads, exact)
