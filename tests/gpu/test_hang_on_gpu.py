"""What NCCL's flight recorder says of a rank that did not come to a collective."""

import time

import pytest
import torch

from core.config.parallel import ParallelConfig
from core.parallel.collectives import all_reduce
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerPool
from core.training.hang import RankState, diagnose, rank_state

pytestmark = pytest.mark.multi_gpu


def _late() -> tuple[RankState, RankState]:
    """Rank 1 is late for the third all-reduce: the states then, and when all is over."""
    device = torch.device("cuda", torch.cuda.current_device())
    ctx = ParallelContext.create(ParallelConfig(tp=2), device)
    groups = ctx.describe_groups()
    x = torch.ones(7, device=device)
    for _ in range(2):
        all_reduce(x, ctx.tp)
    torch.cuda.synchronize()
    time.sleep(2.0)  # NCCL's own watchdog retires what is done
    if ctx.tp.rank == 0:
        all_reduce(x, ctx.tp)
    time.sleep(3.0)
    during = rank_state(5, "training", groups)
    time.sleep(1.0)
    if ctx.tp.rank == 1:
        all_reduce(x, ctx.tp)
    torch.cuda.synchronize()
    time.sleep(2.0)
    return during, rank_state(6, "training", groups)


def test_the_late_rank_and_the_collective_are_named() -> None:
    pool = WorkerPool()  # a recorder keeps what groups of the same name did in earlier tests
    try:
        (waiting, done), (late, _) = pool.run(_late, 2, device="cuda")
    finally:
        pool.close()
    assert waiting.waits_in is not None
    number = waiting.waits_in.number
    assert waiting.waits_in.kind == "all_reduce"
    assert waiting.waits_in.elements == 7
    assert late.waits_in is None
    said = diagnose({0: waiting, 1: late})
    assert said.startswith("rank 1 is in training of step 5, and in no collective; rank 0 waits in")
    assert f"all_reduce number {number} over tp [0, 1] (7 elements) of step 5 for rank 1" in said
    assert done.waits_in is None
