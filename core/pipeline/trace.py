"""Measured timelines as JSON: what an executor writes and `python -m core.pipeline show` draws.

```
{
  "schedule": "zbv",
  "actions": [
    {"stage": 0, "kind": "forward", "chunk": 0, "microbatch": 0, "start": 0.0, "end": 1.7},
    ...
  ]
}
```
`kind` is one of `Kind`. Times are milliseconds on a clock that is the same for all stages. Order
does not matter: actions are sorted by their start.
"""

import json
import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from core.errors import DataError
from core.pipeline.costs import Work
from core.pipeline.schedules import Action, Kind, Message, Schedule
from core.pipeline.simulate import Timed, Timeline


def write_trace(path: Path, schedule: str, timeline: Timeline) -> None:
    """Write a measured timeline of one step.

    Args:
        path: the file.
        schedule: name of the schedule.
        timeline: actions of every stage with their times in milliseconds.

    Raises:
        DataError: the file cannot be written.
    """
    actions = [
        {"stage": stage, **action._asdict(), "start": start, "end": end}
        for stage, entries in enumerate(timeline)
        for action, start, end in entries
    ]
    rows = ",\n".join(f"    {json.dumps(action)}" for action in actions)
    head = f'{{\n  "schedule": {json.dumps(schedule)},\n  "actions": [\n'
    try:
        path.write_text(f"{head}{rows}\n  ]\n}}\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error


def read_trace(path: Path, schedule: Schedule) -> Timeline:
    """Read a measured timeline of a schedule.

    Raises:
        DataError: the file is missing, not in this format, of another schedule, not of the same
            actions, or of actions that overlap on one stage.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("actions"), list):
        raise DataError(f"{path} is no trace: it must hold an object with a list of actions")
    if found.get("schedule") != schedule.name:
        raise DataError(
            f"{path} was measured under schedule {found.get('schedule')}, not {schedule.name}: "
            "give the same --schedule"
        )
    stages: list[list[Timed]] = [[] for _ in schedule.actions]
    for index, row in enumerate(found["actions"]):
        stage, timed = _entry(path, index, row)
        if not 0 <= stage < len(stages):
            raise DataError(
                f"{path}: action {index} is on stage {stage}, but the schedule has {len(stages)} "
                "stages: give the same --stages"
            )
        stages[stage].append(timed)
    timeline = tuple(tuple(sorted(entries, key=lambda e: (e.start, e.end))) for entries in stages)
    _is_of_schedule(path, timeline, schedule)
    return timeline


def _entry(path: Path, index: int, row: Any) -> tuple[int, Timed]:
    try:
        action = Action(Kind(row["kind"]), int(row["chunk"]), int(row["microbatch"]))
        stage, start, end = int(row["stage"]), float(row["start"]), float(row["end"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: action {index} cannot be read ({type(error).__name__}: {error}): it needs "
            "stage, kind, chunk, microbatch, start and end"
        ) from error
    if not -math.inf < start <= end < math.inf:
        raise DataError(f"{path}: action {index} starts at {start} ms and ends at {end} ms")
    return stage, Timed(action, start, end)


def _is_of_schedule(path: Path, timeline: Timeline, schedule: Schedule) -> None:
    for stage, (entries, actions) in enumerate(zip(timeline, schedule.actions, strict=True)):
        measured = [entry.action for entry in entries]
        if sorted(measured) != sorted(actions):
            where = schedule.stage_map
            raise DataError(
                f"{path}: the {len(measured)} actions of stage {stage} are not the {len(actions)} "
                f"of {schedule.name} with {where.stages} stages, {where.chunks} chunks and "
                f"{schedule.microbatches} microbatches: give the sizes that were measured"
            )
        for before, after in pairwise(entries):
            if after.start < before.end:
                raise DataError(
                    f"{path}: on stage {stage}, {after.action} starts at {after.start} ms, before "
                    f"{before.action} ends at {before.end} ms"
                )


def first_deviation(timeline: Timeline, schedule: Schedule) -> str | None:
    """Where a measured order first leaves the schedule's, or None if it never does."""
    for stage, (entries, actions) in enumerate(zip(timeline, schedule.actions, strict=True)):
        for index, (entry, action) in enumerate(zip(entries, actions, strict=True)):
            if entry.action != action:
                return f"stage {stage} ran {entry.action} as action {index} in place of {action}"
    return None


def measured_work(timeline: Timeline, schedule: Schedule) -> tuple[Work, ...]:
    """For every piece, the median time of each kind of action; 0 for kinds that it does not have.

    The parts of a whole backward pass are not told apart: all of it counts as input gradient.
    """
    times: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for stage, entries in enumerate(timeline):
        for action, start, end in entries:
            piece = schedule.stage_map.piece(stage, action.chunk)
            times[piece, action.kind].append(end - start)

    def typical(piece: int, kind: Kind) -> float:
        return median(times.get((piece, kind), [0.0]))

    return tuple(
        Work(
            typical(piece, Kind.FORWARD),
            typical(piece, Kind.BACKWARD) + typical(piece, Kind.BACKWARD_INPUT),
            typical(piece, Kind.BACKWARD_WEIGHT),
        )
        for piece in range(schedule.stage_map.pieces)
    )


def measured_transfer(timeline: Timeline, schedule: Schedule) -> float:
    """How long a message takes: the median time from the action that makes one to the action that
    was waiting for it; 0 if none ever waited.
    """
    made: dict[Message, tuple[int, float]] = {}
    for stage, entries in enumerate(timeline):
        for action, _, end in entries:
            if message := schedule.makes(stage, action):
                made[message] = stage, end
    waits = []
    for stage, entries in enumerate(timeline):
        free = -math.inf
        for action, start, end in entries:
            needed = schedule.needs(stage, action)
            if needed is not None:
                source, ready = made[needed]
                if source != stage and free < ready:
                    # Clocks of two stages are the same but for some microseconds.
                    waits.append(max(0.0, start - ready))
            free = end
    return median(waits) if waits else 0.0
