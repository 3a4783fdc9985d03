import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from core.errors import ConfigError
from core.pipeline.costs import Part, Work, language_model_parts
from core.pipeline.layout import Layout, balanced, expand_layout, parse_layout
from core.pipeline.schedules import stage_map_for
from core.pipeline.stage_map import StageMap
from models.llama.config import PRESETS


def _parts(costs: str | Sequence[float]) -> list[Part]:
    """Parts named by a string (E costs nothing, L two layers), or layers of given costs."""
    if isinstance(costs, str):
        times = {"E": 0.0, "L": 2.0}
        pairs = [(symbol, times.get(symbol, 1.0)) for symbol in costs]
    else:
        pairs = [("t", cost) for cost in costs]
    return [
        Part(symbol=symbol, name=symbol, work=Work(cost, cost, cost), parameters=1)
        for symbol, cost in pairs
    ]


def _cuts(count: int, where: StageMap) -> Iterator[tuple[int, ...]]:
    for inner in combinations(range(1, count), where.pieces - 1):
        yield (0, *inner, count)


def _brute_force(parts: Sequence[Part], where: StageMap) -> list[tuple[float, float, int]]:
    """Every cut's slowest stage, squares, and parts on the first and last piece; best first."""
    scores = []
    for bounds in _cuts(len(parts), where):
        costs = Layout(tuple(parts), bounds, where).stage_costs
        ends = bounds[1] - bounds[0] + bounds[-1] - bounds[-2]
        scores.append((max(costs), sum(cost * cost for cost in costs), ends))
    return sorted(scores)


def _score(layout: Layout) -> tuple[float, float, int]:
    costs, bounds = layout.stage_costs, layout.bounds
    ends = bounds[1] - bounds[0] + bounds[-1] - bounds[-2]
    return max(costs), sum(cost * cost for cost in costs), ends


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_of_one_chunk_is_better(seed: int) -> None:
    rng = random.Random(seed)
    parts = _parts([rng.randint(0, 6) for _ in range(rng.randint(2, 11))])
    where = StageMap(rng.randint(1, min(5, len(parts))))
    layout = balanced(parts, where)
    assert all(stop > start for start, stop in pairwise(layout.bounds))
    best = _brute_force(parts, where)[0]
    assert _score(layout) == best


@pytest.mark.parametrize("shape", ["loop", "v"])
@pytest.mark.parametrize(
    ("stages", "layers", "head"), [(2, 9, 2), (2, 8, 5), (3, 9, 3), (3, 10, 1)]
)
def test_no_cut_of_equal_layers_into_chunks_is_better(
    shape: str, stages: int, layers: int, head: int
) -> None:
    parts = [
        replace(p, work=Work(0, head, 0)) if p.symbol == "L" else p
        for p in _parts("E" + "t" * layers + "L")
    ]
    where = StageMap(stages, 2, "v" if shape == "v" else "loop")
    slowest, squares, _ = _brute_force(parts, where)[0]
    assert _score(balanced(parts, where))[:2] == (slowest, squares)


@pytest.mark.parametrize("seed", range(30))
def test_chunks_of_mixed_layers_come_close(seed: int) -> None:
    rng = random.Random(seed)
    parts = _parts([rng.randint(1, 4) for _ in range(rng.randint(6, 11))])
    where = StageMap(rng.randint(2, 3), 2, rng.choice(("loop", "v")))
    slowest = balanced(parts, where)
    assert max(slowest.stage_costs) <= 1.25 * _brute_force(parts, where)[0][0]


def test_ties_go_to_fewer_layers_at_the_ends() -> None:
    assert str(balanced(_parts("t" * 10), StageMap(4))) == "t*2|t*3|t*3|t*2"
    assert str(balanced(_parts("E" + "t" * 8 + "L"), StageMap(4))) == "E t*2|t*3|t*3|L"


def test_a_large_vocabulary_no_longer_halves_the_speed() -> None:
    """8 layers and a 128k vocabulary over 4 stages: even counts leave stages waiting."""
    config = replace(PRESETS["llama3.2-1b"](), num_layers=8)
    parts, where = language_model_parts(config, 2048), StageMap(4)
    even = parse_layout("E t*2|t*2|t*2|t*2 L", parts, where)
    layout = balanced(parts, where)
    assert max(layout.stage_costs) < 0.75 * max(even.stage_costs)
    assert len(layout.piece(3)) < len(even.piece(3))


def test_as_many_stages_as_parts() -> None:
    parts = _parts("EtttL")
    assert str(balanced(parts, StageMap(5))) == "E|t|t|t|L"
    with pytest.raises(ConfigError, match=r"6 stages of 1 chunks hold 6 pieces.* has 5 parts"):
        balanced(parts, StageMap(6))
    with pytest.raises(ConfigError, match=r"3 stages of 2 chunks hold 6 pieces.* has 5 parts"):
        balanced(parts, StageMap(3, 2))


def test_large_models_are_cut_quickly_and_parts_of_no_cost_too() -> None:
    layout = balanced(_parts("E" + "t" * 126 + "L"), StageMap(16, 4))
    assert sum(layout.stage_costs) == pytest.approx(3 * 128)
    assert max(layout.stage_costs) == pytest.approx(3 * 8)
    free = [replace(part, work=Work()) for part in _parts("tttt")]
    assert len(balanced(free, StageMap(3)).bounds) == 4
    assert "100%" not in balanced(free, StageMap(3)).table()


@pytest.mark.parametrize(
    "text", ["E t*3|t*3|t*2|L", "Ettt|ttt|tt|L", "E,(t*3|)*2,tt|L", " E t*3 | t*3|t t |L"]
)
def test_strings_that_mean_the_same(text: str) -> None:
    parts = _parts("EttttttttL")
    layout = parse_layout(text, parts, StageMap(4))
    assert layout.bounds == (0, 4, 7, 9, 10)
    assert str(layout) == "E t*3|t*3|t*2|L"
    assert parse_layout(str(layout), parts, StageMap(4)) == layout


def test_other_kinds_of_parts_and_pieces_that_pass_data_on() -> None:
    """A vision tower before the embedding, encoder and decoder layers, an empty piece."""
    parts = _parts("vvEeettL")
    layout = parse_layout("vv||E e e|ttL", parts, StageMap(2, 2))
    assert [len(layout.piece(i)) for i in range(4)] == [2, 0, 3, 3]
    assert layout.trainable == (True, False, True, True)
    assert layout.stage_costs == (3 * 4, 3 * 4)
    assert "v*2 | E e*2" in layout.table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Ett|tL", r"has 2 pieces, but 3 stages of 1 chunks hold 3: divide it by 2 signs \|"),
        ("Ett|tt|L", r"names t 4 times, but the model, E t\*3 L, has 3"),
        ("Et|t|mtL", "names m 1 times, but the model, .*, has 0"),
        ("Et|tLt|", "another order"),
        ("|Ett|tL", "empty first piece"),
        ("Ett|tL|", "empty last piece"),
        ("Et*|t|L", r"cannot be read at '\*\|t\|L'"),
        ("E(t|t|tL", r"cannot be read at '\(t\|t\|tL'"),
        ("Et*999999|t|L", "cannot be read"),
        ("Et*9999999|t|L", "cannot be read"),
        ("((((t*99999)*99999)*9)*9)*9", "cannot be read"),
        ("Et*3|é|L", "cannot be read at 'é"),
        ("", "has 1 pieces"),
    ],
)
def test_strings_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_layout(text, _parts("EtttL"), StageMap(3))
    assert "\n" not in str(caught.value)


def test_counts_are_written_out() -> None:
    assert expand_layout("E((t*2|)*2m|)*2L") == "Ett|tt|m|tt|tt|m|L"
    assert expand_layout("t*0 L") == "L"


def test_frozen_parts_shift_the_balance() -> None:
    """Six frozen layers cost a third: only their forward pass."""
    parts = [replace(part, frozen=i < 6) for i, part in enumerate(_parts("t" * 8))]
    layout = balanced(parts, StageMap(2))
    assert str(layout) == "t*6|t*2"
    assert layout.trainable == (False, True)
    assert layout.work == (Work(6, 0, 0), Work(2, 2, 2))


def test_table() -> None:
    layout = parse_layout("Ett|ttL", _parts("EttttL"), StageMap(2))
    assert layout.table().splitlines() == [
        "stage  parts  parameters   cost  of slowest",
        "    0  E t*2           3  33.3%         50%",
        "    1  t*2 L           3  66.7%        100%",
        "stage 1 is the slowest: it alone lets all stages together be busy 75.0% of the time",
    ]
    assert "parameters" not in layout.table(parameters=False)


def test_a_stage_holds_a_tied_table_once() -> None:
    config = replace(PRESETS["llama3.2-1b"](), num_layers=6)
    assert config.tie_embeddings
    parts, table = language_model_parts(config, 2048), config.vocab_size * config.hidden_size
    whole = sum(part.parameters for part in parts)
    v, loop = (balanced(parts, stage_map_for(name, 2)) for name in ("zbv", "1f1b"))
    assert sum(v.stage_parameters) == whole - table
    assert f"{v.stage_parameters[0]:,}" in v.table()
    assert sum(loop.stage_parameters) == whole
    untied = language_model_parts(replace(config, tie_embeddings=False), 2048)
    assert sum(balanced(untied, v.stage_map).stage_parameters) == whole
