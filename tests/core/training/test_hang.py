"""Who holds up a run that hangs, and in which collective the others wait."""

import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from queue import Queue

import pytest
import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    TCPStore,
)

from core.config.parallel import ParallelConfig
from core.parallel.collectives import all_reduce, start_all_reduce, wait
from core.parallel.context import ParallelContext
from core.pipeline.p2p import Awaited
from core.testing.distributed import WorkerPool
from core.training import hang
from core.training.failure import FailureBoard, Patience, SentenceHandler, Watchdog
from core.training.hang import Collective, RankState, diagnose, rank_state
from core.training.interrupts import StopRequest


def at(group: str, ranks: tuple[int, ...], number: int) -> Collective:
    return Collective(group, ranks, number, "all_reduce", 1200)


def test_states_survive_the_store() -> None:
    for state in (
        RankState(3, "training", at("tp", (0, 1), 7), {"tp": 7, "dp": 2}),
        RankState(1, "saving"),
        RankState(1, "training", awaited=Awaited("sending", 2)),
    ):
        assert RankState.from_json(state.to_json()) == state


def test_the_rank_that_did_not_come_is_blamed() -> None:
    """Rank 1 sleeps; rank 0 waits for it over tp, rank 2 over dp for rank 0, rank 3 for rank 1."""
    states = {
        0: RankState(7, "training", at("tp [0, 1]", (0, 1), 5), {"tp [0, 1]": 5, "dp [0, 2]": 2}),
        1: RankState(7, "training", None, {"tp [0, 1]": 4, "dp [1, 3]": 2}),
        2: RankState(7, "training", at("dp [0, 2]", (0, 2), 3), {"dp [0, 2]": 3}),
        3: RankState(7, "training", at("dp [1, 3]", (1, 3), 3), {"dp [1, 3]": 3}),
    }
    assert diagnose(states) == (
        "rank 1 is in training of step 7, and in no collective; "
        "rank 0 waits in all_reduce number 5 over tp [0, 1] (1,200 elements) of step 7 for rank 1; "
        "rank 2 waits in all_reduce number 3 over dp [0, 2] (1,200 elements) of step 7 for rank 0; "
        "rank 3 waits in all_reduce number 3 over dp [1, 3] (1,200 elements) of step 7 for rank 1"
    )


def test_a_stage_that_sends_nothing_is_blamed() -> None:
    """Rank 3 sleeps on the second stage, whose messages rank 1 waits for; 0 and 2 wait over dp."""
    groups = {"dp [0, 1]": 2, "dp [2, 3]": 2}
    message = Awaited("the receipt of gradient for piece 0, microbatch 4", 3)
    states = {
        0: RankState(7, "training", at("dp [0, 1]", (0, 1), 3), {"dp [0, 1]": 3}),
        # A reduction that it has begun and that goes on is not what it waits for.
        1: RankState(7, "training", at("dp [0, 1]", (0, 1), 2), groups, message),
        2: RankState(7, "training", at("dp [2, 3]", (2, 3), 3), {"dp [2, 3]": 3}),
        3: RankState(7, "training", None, groups),
    }
    assert diagnose(states) == (
        "rank 3 is in training of step 7, and in no collective; "
        "rank 0 waits in all_reduce number 3 over dp [0, 1] (1,200 elements) of step 7 for rank 1; "
        "rank 1 waits in the receipt of gradient for piece 0, microbatch 4 of step 7 for rank 3; "
        "rank 2 waits in all_reduce number 3 over dp [2, 3] (1,200 elements) of step 7 for rank 3"
    )


def test_a_rank_that_does_not_answer_is_blamed() -> None:
    waits = RankState(7, "training", at("tp [0, 1]", (0, 1), 5), {"tp [0, 1]": 5})
    assert diagnose({0: waits, 1: None}).startswith(
        "rank 1 does not answer: it is stopped, dead or cut off; rank 0 waits in all_reduce number"
    )


def test_ranks_that_went_different_ways() -> None:
    states = {
        0: RankState(2, "training", at("tp [0, 1]", (0, 1), 5), {"tp [0, 1]": 5, "w [0, 1]": 1}),
        1: RankState(2, "saving", at("w [0, 1]", (0, 1), 2), {"tp [0, 1]": 4, "w [0, 1]": 2}),
    }
    assert diagnose(states).endswith("for rank 0; they wait for each other: the ranks have gone "
                                     "different ways")  # fmt: skip


def test_a_collective_that_all_have_begun() -> None:
    both = RankState(2, "training", at("tp [0, 1]", (0, 1), 5), {"tp [0, 1]": 5})
    assert diagnose({0: both, 1: both}).count("which all have begun: look at its device") == 2


def test_without_a_flight_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "c10d", object())
    assert rank_state(4, "training", {"0": ("tp", (0, 1))}) == RankState(4, "training")


def _hang(port: int, prefix: str) -> tuple[tuple[int, str] | None, int, int]:
    """Rank 1 sleeps before the third all-reduce over tp; the first failure, the status that its
    watchdog would have left with, and how long the other took to find the hang, in tenths of a
    second."""
    ctx = ParallelContext.create(ParallelConfig(tp=2), torch.device("cpu"))
    rank = ctx.world.rank
    store = PrefixStore(
        prefix, TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=10))
    )
    board = FailureBoard(rank, store, ctx.world.size)
    left: Queue[int] = Queue()
    dog = Watchdog(
        Patience(1.0 if rank == 0 else 60.0, 0.0),
        SentenceHandler(board),
        StopRequest(),
        ctx.describe_groups(),
        left.put,
    )
    x = torch.ones(3, 4)
    for _ in range(2):
        all_reduce(x, ctx.tp)
        wait(start_all_reduce(x, ctx.dp))
    dist.barrier()
    dog.start()
    dog.beat(6, "training")
    started = time.monotonic()
    if rank != 1:
        work = start_all_reduce(x, ctx.tp)
    status = left.get(timeout=30)
    seconds = time.monotonic() - started
    dog.stop()
    dist.barrier()  # of the watchdogs' ends; rank 1 comes late to tp below
    if rank == 1:
        work = start_all_reduce(x, ctx.tp)
    wait(work)
    return board.read(), status, int(10 * seconds)


@pytest.fixture
def fresh_pool() -> Iterator[WorkerPool]:
    """A flight recorder keeps what groups of the same name did in earlier tests."""
    workers = WorkerPool()
    yield workers
    workers.close()


def test_a_rank_that_sleeps_before_a_collective_is_named(fresh_pool: WorkerPool) -> None:
    results = fresh_pool.run(_hang, 4, fresh_pool._store.port, uuid.uuid4().hex)
    for first, status, tenths in results:
        assert status == 1
        assert 10 < tenths < 150
        assert first is not None
        rank, sentence = first
        assert rank == 0
        assert "s: rank 1 is in training of step 6, and in no collective; rank 0 waits" in sentence
        assert (
            "in all_reduce number 3 over tp [0, 1] (12 elements) of step 6 for rank 1" in sentence
        )
        assert "rank 2 waits" not in sentence
        assert "raise --train.hang-timeout-seconds" in sentence


def test_the_oldest_open_collective_is_found(pool: WorkerPool) -> None:
    states = pool.run(_begin_two, 2)
    assert states[0].waits_in == Collective("tp [0, 1]", (0, 1), 2, "all_reduce", 5)
    assert states[0].begun["tp [0, 1]"] >= 3
    assert states[1].waits_in is None


def _begin_two() -> RankState:
    ctx = ParallelContext.create(ParallelConfig(tp=2), torch.device("cpu"))
    all_reduce(torch.ones(3), ctx.tp)
    tensors = [torch.ones(5), torch.ones(6)]
    works = [start_all_reduce(x, ctx.tp) for x in tensors] if ctx.tp.rank == 0 else []
    time.sleep(1.0)
    state = rank_state(1, "training", ctx.describe_groups())
    time.sleep(1.0)
    works = works or [start_all_reduce(x, ctx.tp) for x in tensors]
    for work in works:
        wait(work)
    return state
