"""Products of sequence-parallel layers, with the communication before and after them, are those of
one process, in fp64. (What overlaps them needs GPUs: `tests/gpu/test_overlap_on_gpu.py`.)"""

from typing import get_args

import pytest
import torch
from torch import Tensor

from core.config.parallel import ParallelConfig, TpOverlap
from core.layers.embedding import VocabParallelHead
from core.layers.fp8_products import Fp8Products
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.overlap import OVERLAPS
from core.layers.products import PLAIN, Products
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import ZEROS
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.layouts import LayerCase, run_case
from core.testing.parity import assert_close

CPU = torch.device("cpu")
S, B, H = 8, 3, 24
PRODUCTS: dict[str, Products] = {
    "plain": PLAIN,
    "current": Fp8Products(),
    "rowwise": Fp8Products(by_row=True),
}


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _cases(place: Placement) -> dict[str, LayerCase]:
    found = {}
    for name, recipe in PRODUCTS.items():
        column = ColumnParallelLinear(place, H, [Block(20)], init=ZEROS, bias=True, products=recipe)
        copies = declared_parameters(column)["weight"].sharding.copies
        found[f"column {name}"] = LayerCase(column, column, ((_x(S, B, H), "sequence"),), copies)
        row = RowParallelLinear(place, Block(4, 5), H, init=ZEROS, bias=True, products=recipe)
        found[f"row {name}"] = LayerCase(row, row, ((_x(S, B, 20), "last"),))
    head = VocabParallelHead(place, 67, H, init=ZEROS)
    copies = declared_parameters(head)["weight"].sharding.copies
    found["head"] = LayerCase(head, head, ((_x(S, B, H), "sequence"),), copies)
    return found


def _run(ctx: ParallelContext) -> dict[str, dict[str, Tensor]]:
    place = Placement(ctx, torch.float64, CPU)
    return {name: run_case(case, ctx) for name, case in _cases(place).items()}


def _run_rank(tp: int) -> dict[str, dict[str, Tensor]]:
    config = ParallelConfig(tp=tp, sequence_parallel=True)
    return _run(ParallelContext.create(config, CPU))


@pytest.mark.parametrize("tp", [2, 4])
def test_products_are_those_of_one_process(pool: WorkerPool, tp: int) -> None:
    expected = _run(ParallelContext.single())
    for actual in pool.run(_run_rank, tp, tp):
        for name, results in expected.items():
            for what, tensor in results.items():
                assert_close(actual[name][what], tensor, 1e-12, f"{name}: {what}")


def test_every_way_is_there() -> None:
    assert set(OVERLAPS) == set(get_args(TpOverlap))
