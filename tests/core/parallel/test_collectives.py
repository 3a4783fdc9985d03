from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core.config.parallel import ParallelConfig
from core.parallel import collectives
from core.parallel.context import Axis, ParallelContext
from core.testing.distributed import WorkerPool


def _inputs(tp: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn((4, 3, 8), generator=generator, dtype=torch.float64) for _ in range(tp)]


def _run(name: str, tp: int) -> tuple[Tensor, Tensor]:
    """This rank's output, and its input's gradient under a loss that weights the outputs of each
    rank."""
    ctx = ParallelContext.create(ParallelConfig(tp=tp), torch.device("cpu"))
    rank = ctx.tp.rank
    x = _inputs(tp)[rank].clone().requires_grad_()
    collective: Callable[[Tensor, Axis], Tensor] = getattr(collectives, name)
    y = collective(x, ctx.tp)
    weight = torch.arange(y.numel(), dtype=torch.float64).view(y.shape).cos()
    alike_after = name in ("reduce_from", "gather_last")
    (y * weight * (1 if alike_after else rank + 1)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def _expected(name: str, tp: int) -> list[tuple[Tensor, Tensor]]:
    """The same with plain tensor operations on all ranks' inputs at once."""
    xs = [x.clone().requires_grad_() for x in _inputs(tp)]
    total = torch.stack(xs).sum(0)
    ys = {
        "reduce_from": [total] * tp,
        "gather_last": [torch.cat(xs, -1)] * tp,
        "reduce_scatter_sequence": list(total.chunk(tp, 0)),
    }[name]
    alike_after = name in ("reduce_from", "gather_last")
    loss = torch.zeros((), dtype=torch.float64)
    for rank, y in enumerate(ys):
        if alike_after and rank:
            break  # one loss, which every rank computes alike
        weight = torch.arange(y.numel(), dtype=torch.float64).view(y.shape).cos()
        loss = loss + (y * weight * (1 if alike_after else rank + 1)).sum()
    loss.backward()
    grads = [x.grad for x in xs]
    return [(y.detach(), g) for y, g in zip(ys, grads, strict=True) if g is not None]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", ["reduce_from", "gather_last", "reduce_scatter_sequence"])
def test_forward_and_backward(pool: WorkerPool, name: str, tp: int) -> None:
    actual = pool.run(_run, tp, name, tp)
    for (y, grad), (expected_y, expected_grad) in zip(actual, _expected(name, tp), strict=True):
        torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)
