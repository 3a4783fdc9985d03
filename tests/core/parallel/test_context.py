from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]

from core.config.parallel import ParallelConfig
from core.config.train import TrainConfig
from core.errors import ConfigError
from core.parallel.context import ParallelContext
from core.parallel.rendezvous import Rendezvous, init_distributed
from core.testing.distributed import WorkerPool
from core.training.process import collective_timeout

CPU = torch.device("cpu")


def _axes_and_groups() -> tuple[bool, int, list[int]]:
    """Whether the groups of axes are found again, how many groups were made for others, and what
    those sum up to."""
    ctx = ParallelContext.create(ParallelConfig(tp=2), CPU)
    made: list[list[int]] = []
    new_group = dist.new_group

    def counted(ranks: list[int], **kwargs: Any) -> object:
        made.append(ranks)
        return new_group(ranks, **kwargs)

    dist.new_group = counted  # type: ignore[assignment]
    try:
        found = ctx.new_groups([(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3), (2,)])
        same = all(found[axis.ranks] is axis.group for axis in (ctx.tp, ctx.dp, ctx.world))
        assert found[(2,)] is None
        assert not made
        others = [(0, 3), (1, 2)]
        groups = ctx.new_groups(others)
        again = ctx.new_groups(others)
    finally:
        dist.new_group = new_group
    sums = []
    for ranks in others:
        assert again[ranks] is groups[ranks]
        if dist.get_rank() in ranks:
            value = torch.tensor(dist.get_rank())
            dist.all_reduce(value, group=groups[ranks])
            sums.append(int(value))
    return same, len(made), sums


def test_groups_are_made_once_and_those_of_axes_never_again(pool: WorkerPool) -> None:
    assert pool.run(_axes_and_groups, 4) == [(True, 2, [3])] * 4


@pytest.mark.parametrize("seconds", [0.0, 10.0, 7200.0])
def test_ranks_wait_longer_than_the_watchdog(
    monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: given.update(kwargs))
    timeout = collective_timeout(TrainConfig(hang_timeout_seconds=seconds))
    store = HashStore()
    init_distributed("cpu", timeout, Rendezvous("start", 1, 2, store))
    assert given == {
        "timeout": timeout,
        "store": store,
        "rank": 1,
        "world_size": 2,
        "device_id": None,
    }
    assert timeout > timedelta(seconds=seconds or 10**6)


def _timeouts_and_names() -> tuple[list[float], dict[str, tuple[str, tuple[int, ...]]]]:
    timeout = timedelta(seconds=1234)
    ctx = ParallelContext.create(ParallelConfig(tp=2), CPU, timeout)
    made = ctx.new_groups([(0, 3), (1, 2)])
    groups = [ctx.tp.group, ctx.dp.group, ctx.world.group]
    groups += [group for ranks, group in made.items() if dist.get_rank() in ranks]
    backends = [group._get_backend(CPU) for group in groups if group is not None]
    return [backend.options._timeout.total_seconds() for backend in backends], ctx.describe_groups()


def test_all_groups_share_the_time_limit_and_have_names(pool: WorkerPool) -> None:
    for rank, (timeouts, names) in enumerate(pool.run(_timeouts_and_names, 4)):
        assert timeouts == [1234.0] * 4
        tp, dp = (0, 1) if rank < 2 else (2, 3), (rank % 2, rank % 2 + 2)
        other = (0, 3) if rank in (0, 3) else (1, 2)
        expected = [("tp", tp), ("dp", dp), ("world", (0, 1, 2, 3)), ("", other)]
        assert sorted(names.values()) == sorted(expected)


def test_overlap_that_the_machine_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ParallelConfig(tp=2, sequence_parallel=True, tp_overlap="symmetric_memory")
    with pytest.raises(ConfigError, match="symmetric_memory needs GPUs, not cpu"):
        ParallelContext.create(config, torch.device("cpu"))
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", raising=False)
    with pytest.raises(ConfigError, match="set TORCH_SYMM_MEM_DISABLE_MULTICAST=1"):
        ParallelContext.create(config, torch.device("cuda", 0))
