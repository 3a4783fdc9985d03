"""Communication hidden under tensor-parallel products changes no result on GPUs."""

import os

import pytest
import torch
from torch import Tensor

from core.config.parallel import ParallelConfig, TpOverlap
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import Init
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

S, B, H, F = 512, 2, 512, 1024


def _run(overlap: TpOverlap) -> list[Tensor]:
    """This rank's output and gradients of a column and a row layer, one after the other."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    device = torch.device("cuda", torch.distributed.get_rank())
    config = ParallelConfig(tp=2, sequence_parallel=True, tp_overlap=overlap)
    ctx = ParallelContext.create(config, device)
    place, init = Placement(ctx, torch.bfloat16, device), Init("normal", 0.03)
    column = ColumnParallelLinear(place, H, [Block(F)], init=init)
    row = RowParallelLinear(place, Block(F), H, init=init)
    initialize_parameters(declared_parameters(torch.nn.ModuleList([column, row])), seed=1)
    generator = torch.Generator().manual_seed(ctx.tp.rank)
    x, dy = (torch.randn(S // 2, B, H, generator=generator).bfloat16().to(device) for _ in "ab")
    x.requires_grad_()
    y = row(column(x))
    y.backward(dy)
    assert x.grad is not None
    assert column.weight.grad is not None
    assert row.weight.grad is not None
    found = (y, x.grad, column.weight.grad, row.weight.grad)
    return [z.detach().float().cpu() for z in found]


def test_symmetric_memory_changes_nothing(pool: WorkerPool) -> None:
    expected = pool.run(_run, 2, "none", device="cuda")
    found = pool.run(_run, 2, "symmetric_memory", device="cuda")
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            # Sums in another order, rounded to bf16.
            assert ((a - b).norm() / b.norm()).item() < 5e-3
