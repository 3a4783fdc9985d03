import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from core.errors import ConfigError
from core.pipeline.costs import Work
from core.pipeline.schedules import SCHEDULES, Action, Edge, Kind, Message, Schedule, make_schedule
from core.pipeline.simulate import Costs, Simulation, check, simulate

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT  # noqa: E741


def _served(name: str) -> list[int]:
    kind = SCHEDULES[name]
    return list(range(kind.min_chunks, (kind.max_chunks or 4) + 1))


SIZES = [
    (name, stages, chunks)
    for name in SCHEDULES
    for chunks in _served(name)
    for stages in range(1, 17)
]


def _is_consistent(result: Simulation, costs: Costs) -> None:
    """Proves a timeline from first principles, with none of the simulator's own functions."""
    schedule, where = result.schedule, result.schedule.stage_map
    ends: dict[tuple[Kind, int, int], float] = {}
    starts: dict[tuple[Kind, int, int], float] = {}
    for stage, entries in enumerate(result.timeline):
        free = 0.0
        for (kind, chunk, microbatch), start, end in entries:
            assert free <= start <= end
            free = end
            key = (kind, where.piece(stage, chunk), microbatch)
            assert key not in ends
            starts[key], ends[key] = start, end
    for (kind, piece, microbatch), start in starts.items():
        if kind == F:
            before = (F, piece - 1, microbatch) if piece else None
        elif kind == W:
            before = (I, piece, microbatch)
        else:
            assert ends[F, piece, microbatch] <= start
            before = (kind, piece + 1, microbatch) if piece + 1 < where.pieces else None
        if before:
            across = kind != W and where.stage(before[1]) != where.stage(piece)
            assert ends[before] + (costs.transfer if across else 0.0) <= start + 1e-9
    split = any(kind == W for kind, _, _ in ends)
    kinds = (F, I, W) if split else (F, B)
    assert len(ends) == len(kinds) * where.pieces * schedule.microbatches
    assert {key[0] for key in ends} == set(kinds)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "stages", "chunks"), SIZES)
def test_every_schedule_is_legal(name: str, stages: int, chunks: int, seed: int) -> None:
    """Any stages, chunks and microbatches, costs, transfer times; two receive slots per edge."""
    rng = random.Random(f"{name} {stages} {chunks} {seed}")
    draws = [rng.randint(*ends) for ends in ((1, 2 * stages), (1, 24), (1, 64), (33, 64))]
    microbatches = [*draws, 16][seed]
    schedule = make_schedule(name, stages=stages, microbatches=microbatches, chunks=chunks)
    work = tuple(
        Work(*(rng.choice((0.0, 0.5, 1.0, 3.0)) for _ in range(3)))
        for _ in range(schedule.stage_map.pieces)
    )
    costs = Costs(work=work, transfer=rng.choice((0.0, 0.1, 2.0)), receive_slots=2)
    _is_consistent(simulate(schedule, costs), costs)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_frozen_pieces_leave_every_schedule_legal(name: str) -> None:
    rng = random.Random(name)
    for _ in range(30):
        stages, microbatches = rng.randint(1, 8), rng.randint(1, 20)
        pieces = stages * SCHEDULES[name].min_chunks
        flags = [rng.random() < 0.5 for _ in range(pieces)]
        flags[rng.randrange(pieces)] = True
        schedule = make_schedule(name, stages=stages, microbatches=microbatches, trainable=flags)
        result = simulate(schedule, Costs(receive_slots=2))
        whole = simulate(make_schedule(name, stages=stages, microbatches=microbatches))
        assert result.makespan <= whole.makespan


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 8), (4, 16), (8, 16), (8, 64), (16, 32)])
def test_bubbles_are_the_published_ones(stages: int, microbatches: int) -> None:
    def bubble(name: str, chunks: int | None = None) -> float:
        return simulate(
            make_schedule(name, stages=stages, microbatches=microbatches, chunks=chunks)
        ).bubble

    p, m = stages - 1, microbatches
    assert bubble("gpipe") == pytest.approx(p / (m + p))
    assert bubble("1f1b") == pytest.approx(p / (m + p))
    assert bubble("interleaved", 2) == pytest.approx(p / (2 * m + p))
    assert bubble("interleaved", 4) == pytest.approx(p / (4 * m + p))
    assert bubble("zb_h1") == pytest.approx(p / (3 * m + p))
    assert bubble("zb_h1") <= bubble("1f1b") / 2
    # Without a break from first to last action, but stages start and end one after the other.
    assert bubble("zbv") == pytest.approx(p / (6 * m + p))


def test_zbv_of_4_stages_and_16_microbatches() -> None:
    result = simulate(make_schedule("zbv", stages=4, microbatches=16))
    assert result.bubble <= 0.031
    for entries in result.timeline:
        busy = sum(entry.end - entry.start for entry in entries)
        assert entries[-1].end - entries[0].start == busy


@pytest.mark.parametrize("stages", [1, 2, 5, 8])
def test_activations_kept(stages: int) -> None:
    for microbatches in (stages, 3 * stages, 40):
        peaks = {
            name: simulate(make_schedule(name, stages=stages, microbatches=microbatches)).peak_live
            for name in ("gpipe", "1f1b", "zb_h1")
        }
        assert peaks["gpipe"] == (microbatches,) * stages
        # Independent of the microbatches.
        assert peaks["1f1b"] == tuple(range(stages, 0, -1))
        assert peaks["zb_h1"] == (stages,) * stages
    for microbatches in (2 * stages, 40):
        v = simulate(make_schedule("zbv", stages=stages, microbatches=microbatches))
        assert v.peak_live == (2 * stages,) * stages


def test_bytes() -> None:
    schedule = make_schedule("1f1b", stages=2, microbatches=4)
    result = simulate(schedule, Costs(activation_bytes=(10, 7), message_bytes=100))
    assert result.peak_live == (2, 1)
    assert result.peak_bytes == (20, 7)
    assert result.peak_messages[Edge(0, 1)] * 100 == result.bytes_in_flight
    # Weight gradients that wait keep less or more than the backward passes before them.
    apart = make_schedule("zb_h1", stages=2, microbatches=4)
    costs = Costs(activation_bytes=(10, 7), product_bytes=(9, 6), working_bytes=(1, 20))
    assert simulate(apart, costs).peak_bytes == (10 + 10 + 1, 6 + 7 + 20)
    assert simulate(apart, replace(costs, working_bytes=0)).peak_bytes == (20, 6 + 7)
    # A piece with nothing trainable in or before it keeps nothing after its forward pass.
    frozen = make_schedule("1f1b", stages=2, microbatches=4, trainable=(False, True))
    assert simulate(frozen).peak_live == (1, 1)
    assert Edge(1, 0) not in simulate(frozen).peak_messages


def test_times_by_hand() -> None:
    schedule = make_schedule("1f1b", stages=2, microbatches=2)
    costs = Costs(work=(Work(1, 1, 1), Work(2, 2, 1)), transfer=0.5)
    result = simulate(schedule, costs)
    times = [[(entry.start, entry.end) for entry in entries] for entries in result.timeline]
    # F0 F1 B0 B1 and F0 B0 F1 B1; whole backward passes of 2 and 3.
    assert times[0] == [(0, 1), (1, 2), (7, 9), (12, 14)]
    assert times[1] == [(1.5, 3.5), (3.5, 6.5), (6.5, 8.5), (8.5, 11.5)]
    assert result.makespan == 14
    assert result.bubble == pytest.approx(1 - 16 / 28)


def test_channels_pass_messages_in_order_and_one_at_a_time() -> None:
    schedule = make_schedule("gpipe", stages=2, microbatches=3)
    result = simulate(schedule, Costs(transfer=4.0))
    assert [entry.start for entry in result.timeline[1][:3]] == [5.0, 9.0, 13.0]


def test_sends_do_not_hold_up_the_sender() -> None:
    """Four messages are made before the first arrives, also if one alone may wait there."""
    schedule = make_schedule("gpipe", stages=2, microbatches=4)
    for slots in (1, None):
        costs = Costs(work=(Work(1, 1), Work(10, 1)), transfer=4.0, receive_slots=slots)
        result = simulate(schedule, costs)
        assert [entry.end for entry in result.timeline[0][:4]] == [1, 2, 3, 4]
        assert result.peak_messages[Edge(0, 1)] == 4


def test_one_receive_slot_is_a_deadlock_where_chunks_share_an_edge() -> None:
    """Why an executor must post receives ahead: order of sending is not order of use."""
    schedule = make_schedule("zbv", stages=4, microbatches=8)
    with pytest.raises(ConfigError, match=r"zbv deadlocks with 1 receive slots per edge: stage \d"):
        simulate(schedule, Costs(receive_slots=1))
    ample = simulate(schedule)
    assert simulate(schedule, Costs(receive_slots=2)).makespan == ample.makespan
    for name in ("gpipe", "1f1b", "zb_h1"):
        simulate(make_schedule(name, stages=4, microbatches=8), Costs(receive_slots=1))


Change = Callable[[list[Action]], None]


def _changed(schedule: Schedule, stage: int, change: Change) -> Schedule:
    actions = list(map(list, schedule.actions))
    change(actions[stage])
    return replace(schedule, actions=tuple(map(tuple, actions)))


def _swap(first: int, second: int) -> Change:
    def change(actions: list[Action]) -> None:
        actions[first], actions[second] = actions[second], actions[first]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop(),
            "stage 1 runs forward, backward_input for chunk 0, microbatch 2, where",
        ),
        (lambda a: a.append(a[0]), "runs forward, backward_input, backward_weight, forward for"),
        (_swap(0, 1), "runs backward_input, forward, backward_weight for chunk 0, microbatch 0"),
        (lambda a: a.insert(0, a.pop()), "runs backward_weight, forward, backward_input for"),
        (lambda a: a.clear(), "runs nothing for chunk 0, microbatch 0"),
        (lambda a: a.append(Action(F, 0, 3)), "microbatch 3, but there are 1 chunks and 3 micro"),
        (lambda a: a.append(Action(F, 1, 0)), "chunk 1, microbatch 0, but there are 1 chunks"),
        (
            lambda a: a.remove(Action(I, 0, 0)),
            "forward, backward or forward, backward_input, backward_weight is right",
        ),
    ],
)
def test_incomplete_or_disordered_schedules_are_found(change: Change, message: str) -> None:
    schedule = make_schedule("zb_h1", stages=2, microbatches=3)
    check(schedule)
    broken = _changed(schedule, 1, change)
    with pytest.raises(ConfigError, match=message):
        simulate(broken)


def test_too_few_stages_are_found() -> None:
    schedule = make_schedule("1f1b", stages=3, microbatches=3)
    with pytest.raises(ConfigError, match="actions for 2 stages, but there are 3"):
        check(replace(schedule, actions=schedule.actions[:2]))


def test_a_deadlock_is_found_and_said() -> None:
    """Both stages wait: the first for a gradient whose forward pass it has not sent yet."""
    schedule = make_schedule("1f1b", stages=2, microbatches=2)
    last_first = [Action(F, 0, 1), Action(B, 0, 1), Action(F, 0, 0), Action(B, 0, 0)]
    one_by_one = [Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1), Action(B, 0, 1)]
    broken = replace(schedule, actions=(tuple(one_by_one), tuple(last_first)))
    check(broken)
    with pytest.raises(ConfigError, match="deadlocks") as caught:
        simulate(broken)
    assert str(caught.value) == (
        "schedule 1f1b deadlocks: stage 0 waits before action 1 (backward of chunk 0, microbatch "
        "0) for stage 1, stage 1 waits before action 0 (forward of chunk 0, microbatch 1) for "
        "stage 0"
    )


def test_channels_are_in_the_order_of_the_simulated_ends() -> None:
    schedule = make_schedule("interleaved", stages=3, microbatches=7, chunks=3)
    result = simulate(schedule)
    sent: dict[Edge, list[Message]] = {}
    for stage, entries in enumerate(result.timeline):
        for action, _, _ in entries:
            message = schedule.makes(stage, action)
            if message:
                target = schedule.stage_map.stage(message.piece)
                sent.setdefault(Edge(stage, target), []).append(message)
    assert {edge: tuple(messages) for edge, messages in sent.items()} == schedule.channels()
    assert (2, 0) in sent  # the loop closes


def test_values_for_pieces_must_fit() -> None:
    schedule = make_schedule("zbv", stages=2, microbatches=3)
    with pytest.raises(ConfigError, match="work has 3 values, but the schedule has 4 pieces"):
        simulate(schedule, Costs(work=(Work(),) * 3))
    with pytest.raises(ConfigError, match="activation_bytes has 1 values"):
        simulate(schedule, Costs(activation_bytes=(1,)))
    with pytest.raises(ConfigError, match="receive_slots is 0"):
        simulate(schedule, Costs(receive_slots=0))


@pytest.mark.parametrize(("name", "stages", "chunks"), SIZES)
def test_forward_passes_alone_come_to_no_deadlock(name: str, stages: int, chunks: int) -> None:
    for microbatches in (1, 2, stages, 2 * stages + 1):
        schedule = make_schedule(name, stages=stages, microbatches=microbatches, chunks=chunks)
        result = simulate(schedule.forward_only(), Costs(receive_slots=2, transfer=0.5))
        assert sum(map(len, result.timeline)) == stages * chunks * microbatches
