"""The layout whose simulated step is the shortest.

That the slowest stage is as fast as can be is not enough: where work ends late, a stage that starts
early may well have more of it, and how much depends on the schedule.
"""

from core.pipeline.layout import Layout, moved
from core.pipeline.schedules import Schedule, make_schedule
from core.pipeline.simulate import Costs, simulate

_EFFORT = 150_000
"""Actions that a search simulates at most: a few seconds."""


def fastest(start: Layout, name: str, microbatches: int) -> Layout:
    """From a layout on, move parts between pieces as long as the simulated step gets shorter.
    Messages take no time in it, and no piece is emptied.

    A search of neighbours, so perhaps not the best of all layouts; the same on every rank.

    Args:
        start: a layout, such as the balanced one.
        name: of the schedule.
        microbatches: microbatches of a step.

    Raises:
        ConfigError: a schedule that cannot serve these sizes.
    """
    best, where = start, start.stage_map
    # More microbatches lengthen a step by the slowest stage's work, whatever else it is like.
    few = min(microbatches, 3 * where.stages)
    schedule = make_schedule(name, stages=where.stages, microbatches=few, chunks=where.chunks)
    left = _EFFORT // sum(map(len, schedule.actions))
    shortest, improved = _step_time(best, schedule, microbatches), True
    while improved:
        improved = False
        neighbours = sorted(_neighbours(best), key=lambda layout: max(layout.stage_costs))
        for layout in neighbours:
            # The slowest stage alone takes at least this long.
            if microbatches * max(layout.stage_costs) >= shortest or not left:
                break
            time, left = _step_time(layout, schedule, microbatches), left - 1
            if time < shortest * (1 - 1e-9):
                best, shortest, improved = layout, time, True
    return best


def _neighbours(layout: Layout) -> list[Layout]:
    """All layouts with one part moved, the pieces between passing one on."""
    where, bounds = layout.stage_map, layout.bounds
    return [
        Layout(layout.parts, tuple(moved(bounds, source, target)), where)
        for source in range(where.pieces)
        if bounds[source + 1] - bounds[source] > 1
        for target in range(where.pieces)
        if target != source
    ]


def _step_time(layout: Layout, schedule: Schedule, microbatches: int) -> float:
    """Of a step of so many microbatches, given a schedule of as many or fewer."""
    more = microbatches - schedule.microbatches
    time = simulate(schedule, Costs(work=layout.work)).makespan
    return time + more * max(layout.stage_costs)
