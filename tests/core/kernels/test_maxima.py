"""What is remembered of a matrix is found through views of the whole, and of nothing else."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from core.kernels.elementwise import _Activation, _AddNorm
from core.kernels.fp8 import E4M3, scale_of_whole
from core.kernels.maxima import maxima_of, remember

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
MAXIMA = torch.tensor([[3.0], [5.0]])


def _written() -> Tensor:
    x = torch.arange(24.0).view(2, 3, 4)
    remember(x, MAXIMA)
    return x


def test_views_of_the_whole_are_known() -> None:
    x = _written()
    gc.collect()
    for view in (x, x.detach(), x.flatten(0, 1), x.view(-1, 2), x.flatten(0, 1).contiguous()):
        assert maxima_of(view) is MAXIMA


def test_anything_else_is_not() -> None:
    x = _written()
    for other in (x[1:], x[:1], x.clone(), x + 0, x.view(torch.int32), torch.zeros(6, 4)):
        assert maxima_of(other) is other
    with torch.inference_mode():
        y = torch.ones(2, 2)
        remember(y, MAXIMA)
        assert maxima_of(y) is y


def test_a_change_is_noticed() -> None:
    for change in (Tensor.zero_, lambda x: x.flatten().add_(1), lambda x: x.detach()[0].neg_()):
        x = _written()
        change(x)
        assert maxima_of(x) is x


def test_it_goes_with_the_memory() -> None:
    class Kept(Tensor):
        pass

    gone: list[bool] = []
    x = torch.zeros(2, 2)
    kept: Any = torch.zeros(1, 1).as_subclass(Kept)
    weakref.finalize(kept, gone.append, True)
    remember(x, kept)
    view = x.view(-1)
    del kept, x
    gc.collect()
    assert not gone
    del view
    gc.collect()
    assert gone == [True]


class _Seen(torch.autograd.Function):
    """A layer that looks at the gradient it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        flat = grads[0].flatten(0, -2).contiguous()
        ctx.seen += [flat, maxima_of(flat)]
        return grads[0], None


def _check(x: Tensor, maxima: Tensor) -> None:
    flat = x.detach().flatten(0, -2)
    assert maxima is not flat
    assert maxima.numel() < flat.numel()
    largest, expected = maxima.abs().amax(), flat.float().abs().amax()
    assert torch.equal(largest.isnan(), expected.isnan())
    assert expected.isnan() or torch.equal(largest, expected)
    scales = [scale_of_whole(y, E4M3) for y in (maxima, flat)]
    torch.testing.assert_close(scales[0], scales[1], rtol=0, atol=0, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(5, 2, 48), (3, 1, 1030), (1, 1, 7)])
def test_kernels_know_the_largest(
    shape: tuple[int, int, int], value: float | None, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    s, b, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(s, b, 2 * width, generator=generator).to(DEVICE, dtype)
    if value is not None:
        x[-1, -1, -1] = value
    hidden = x[..., width:].contiguous()
    weight = torch.randn(width, generator=generator).to(DEVICE, dtype)
    for branch, bias in ((None, None), (hidden, None), (hidden, weight)):
        normed = _AddNorm.apply(hidden, branch, None, weight, bias, 1e-5)[1]
        _check(normed, maxima_of(normed.detach().flatten(0, -2).contiguous()))
    # As in an MLP: flattened, and in the backward pass given back its shape.
    for gated, bias in ((True, None), (False, weight), (True, torch.cat((weight, weight)))):
        seen: list[Tensor] = []
        leaf = (x if gated else hidden).requires_grad_()
        inner = _Seen.apply(leaf, seen)
        out = _Activation.apply(inner.flatten(0, 1), bias, "silu", gated).view(s, b, width)
        _check(out, maxima_of(out.detach().flatten(0, -2).contiguous()))
        out.backward(torch.randn(s, b, width, generator=generator).to(DEVICE, dtype))
        _check(*seen)
