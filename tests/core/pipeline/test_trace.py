import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import DataError
from core.pipeline.costs import Work
from core.pipeline.schedules import SCHEDULES, make_schedule
from core.pipeline.simulate import Costs, Timed, simulate
from core.pipeline.trace import (
    first_deviation,
    measured_transfer,
    measured_work,
    read_trace,
    write_trace,
)

SCHEDULE = make_schedule("zbv", stages=2, microbatches=3)
WORK = tuple(Work(1.25 + piece, 2.5, 0.75) for piece in range(4))
TIMELINE = simulate(SCHEDULE, Costs(work=WORK)).timeline


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_trace(tmp_path / "a.json", "zbv", TIMELINE)
    assert read_trace(tmp_path / "a.json", SCHEDULE) == TIMELINE
    assert first_deviation(TIMELINE, SCHEDULE) is None
    assert measured_work(TIMELINE, SCHEDULE) == WORK
    row = json.loads((tmp_path / "a.json").read_text())["actions"][0]
    assert row == {
        "stage": 0,
        "kind": "forward",
        "chunk": 0,
        "microbatch": 0,
        "start": 0.0,
        "end": 1.25,
    }


def test_whole_backward_passes_count_as_input_gradient() -> None:
    schedule = make_schedule("1f1b", stages=2, microbatches=3)
    timeline = simulate(schedule, Costs(work=Work(1, 2, 4))).timeline
    assert measured_work(timeline, schedule) == (Work(1, 6, 0),) * 2
    assert simulate(schedule, Costs(work=measured_work(timeline, schedule))).timeline == timeline


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_time_of_a_message_is_found(name: str) -> None:
    schedule = make_schedule(name, stages=3, microbatches=5)
    timeline = simulate(schedule, Costs(work=Work(2, 3, 1), transfer=0.25)).timeline
    assert measured_transfer(timeline, schedule) == pytest.approx(0.25)
    alone = make_schedule(name, stages=1, microbatches=5)
    assert measured_transfer(simulate(alone).timeline, alone) == 0.0


def test_another_order_is_told() -> None:
    first, second, *rest = TIMELINE[0]
    swapped = (
        Timed(second.action, first.start, first.end),
        Timed(first.action, second.start, second.end),
        *rest,
    )
    assert first_deviation((swapped, TIMELINE[1]), SCHEDULE) == (
        "stage 0 ran forward of chunk 0, microbatch 1 as action 0 in place of forward of chunk 0, "
        "microbatch 0"
    )


def _edit(index: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda trace: trace["actions"][index].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit(3, kind="sideways"), "action 3 cannot be read .*sideways"),
        (_edit(3, start=None), "action 3 cannot be read"),
        (_edit(3, stage=2), "action 3 is on stage 2, but the schedule has 2"),
        (_edit(3, end=-1.0), "action 3 starts at .* ms and ends at -1.0 ms"),
        (_edit(3, end=float("nan")), "action 3 starts at"),
        (_edit(1, start=0.5), "on stage 0, .* starts at 0.5 ms, before .* ends at 1.25 ms"),
        (
            _edit(3, microbatch=5),
            "the 18 actions of stage 0 are not the 18 of zbv with 2 stages, 2",
        ),
        (lambda trace: trace["actions"].pop(), "the 17 actions of stage 1 are not the 18"),
        (lambda trace: trace["actions"][3].pop("chunk"), "action 3 .*KeyError: 'chunk'"),
        (lambda trace: trace["actions"].insert(0, 3), "action 0 cannot be read"),
        (lambda trace: trace.update(schedule="1f1b"), "under schedule 1f1b, not zbv"),
        (lambda trace: trace.pop("actions"), "is no trace"),
    ],
)
def test_traces_that_are_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "a.json"
    write_trace(path, "zbv", TIMELINE)
    trace = json.loads(path.read_text())
    change(trace)
    path.write_text(json.dumps(trace))
    with pytest.raises(DataError, match=message) as caught:
        read_trace(path, SCHEDULE)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"a.json is not valid JSON"):
        read_trace(tmp_path / "a.json", SCHEDULE)
    with pytest.raises(DataError, match=r"b.json is not valid JSON"):
        read_trace(tmp_path / "b.json", SCHEDULE)
    with pytest.raises(DataError, match=r"c.json cannot be read: No such file"):
        read_trace(tmp_path / "c.json", SCHEDULE)
    with pytest.raises(DataError, match=r"c.json cannot be written: No such file"):
        write_trace(tmp_path / "x" / "c.json", "zbv", TIMELINE)
