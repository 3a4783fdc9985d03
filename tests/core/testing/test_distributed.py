import time

import pytest
import torch
import torch.distributed as dist

from core.testing.distributed import WorkerError, WorkerPool


def _sum_of_ranks(scale: int) -> int:
    x = torch.tensor([dist.get_rank() * scale])
    dist.all_reduce(x)
    return int(x.item())


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one says no")
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_run_gives_every_rank_a_group(pool: WorkerPool, world_size: int) -> None:
    expected = 10 * sum(range(world_size))
    assert pool.run(_sum_of_ranks, world_size, 10) == [expected] * world_size


def test_failure_names_rank_and_does_not_hang(pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 of 2: ") as caught:
        pool.run(_fail_on_rank_one, 2)
    assert "rank one says no" in str(caught.value)
    assert time.monotonic() - start < 60
    assert pool.run(_sum_of_ranks, 2, 1) == [1, 1]


def test_a_worker_that_died_between_calls_is_named_and_replaced(pool: WorkerPool) -> None:
    pool.run(_sum_of_ranks, 2, 1)
    for process, _ in pool._workers[:2]:
        process.kill()
        process.join()
    with pytest.raises(WorkerError, match="rank 0 of 2: the process died"):
        pool.run(_sum_of_ranks, 2, 1)
    assert pool.run(_sum_of_ranks, 2, 1) == [1, 1]
