from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from core.errors import ConfigError
from core.pipeline.costs import Part, Work, language_model_parts
from core.pipeline.fastest import fastest
from core.pipeline.layout import Layout, balanced
from core.pipeline.schedules import make_schedule, stage_map_for
from core.pipeline.simulate import Costs, simulate
from models.llama.config import PRESETS

ALL = ["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"]


def _parts(layers: int, head: float) -> list[Part]:
    layer = Work(1.0, 1.5, 0.9)
    times = {"E": Work(), "L": Work(head, head, head)}
    return [
        Part(symbol=symbol, name=symbol, work=times.get(symbol, layer), parameters=1)
        for symbol in f"E{'t' * layers}L"
    ]


def _fastest(parts: Sequence[Part], name: str, stages: int, microbatches: int) -> Layout:
    return fastest(balanced(parts, stage_map_for(name, stages)), name, microbatches)


def _time(layout: Layout, name: str, microbatches: int) -> float:
    where = layout.stage_map
    schedule = make_schedule(
        name, stages=where.stages, chunks=where.chunks, microbatches=microbatches
    )
    return simulate(schedule, Costs(work=layout.work)).makespan


def _all_layouts(parts: list[Part], name: str, stages: int) -> list[Layout]:
    where = stage_map_for(name, stages)
    cuts = combinations(range(1, len(parts)), where.pieces - 1)
    return [Layout(tuple(parts), (0, *cut, len(parts)), where) for cut in cuts]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("layers", "head"), [(8, 1.8), (6, 3.0)])
def test_close_to_the_best_of_all_layouts(name: str, layers: int, head: float) -> None:
    parts = _parts(layers, head)
    found = _time(_fastest(parts, name, 3, 9), name, 9)
    times = [_time(layout, name, 9) for layout in _all_layouts(parts, name, 3)]
    assert min(times) <= found <= 1.02 * min(times)
    assert found < 0.8 * max(times)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv"])
def test_eight_layers_and_a_large_head_run_faster_than_balanced(name: str) -> None:
    parts = language_model_parts(replace(PRESETS["llama3-8b"](), num_layers=8), 8192)
    even = balanced(parts, stage_map_for(name, 4))
    found = _fastest(parts, name, 4, 16)
    assert _time(found, name, 16) < _time(even, name, 16)


def test_steps_of_many_microbatches_are_timed_by_few() -> None:
    """What is left out takes the slowest stage its work, so the choice is that of all of them."""
    parts = _parts(8, 2.0)
    found = _fastest(parts, "1f1b", 2, 64)
    times = [_time(layout, "1f1b", 64) for layout in _all_layouts(parts, "1f1b", 2)]
    assert _time(found, "1f1b", 64) == pytest.approx(min(times))


def test_a_search_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts(20, 2.0)
    monkeypatch.setattr("core.pipeline.fastest._EFFORT", 0)
    assert _fastest(parts, "zbv", 3, 7) == balanced(parts, stage_map_for("zbv", 3))


def test_too_many_pieces() -> None:
    with pytest.raises(ConfigError, match=r"4 stages of 2 chunks hold 8 pieces.* has 5 parts"):
        _fastest(_parts(3, 1.0), "zbv", 4, 8)
