import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from core.errors import ConfigError
from core.pipeline.costs import Work
from core.pipeline.draw import picture, text_timeline
from core.pipeline.schedules import make_schedule
from core.pipeline.simulate import Costs, Timeline, simulate


def _timeline(name: str, work: Work = Work(1, 1, 1)) -> Timeline:  # noqa: B008
    schedule = make_schedule(name, stages=2, microbatches=3)
    return simulate(schedule, Costs(work=work)).timeline


def test_a_column_is_a_unit_where_it_fits() -> None:
    assert text_timeline(_timeline("1f1b"), 80).splitlines() == [
        "0 FF..BBFBB.BB",
        "1 .FBBFBBFBB..",
    ]
    assert text_timeline(_timeline("zbv"), 19).splitlines() == [
        "0 FFFfiwfiwIWfiwIWIW.",
        "1 .FfFfiwFIWfiwIiIWwW",
    ]


def test_otherwise_columns_are_equal_shares() -> None:
    whole = text_timeline(_timeline("zbv"), 38).splitlines()
    tenths = text_timeline(_timeline("zbv", Work(0.1, 0.1, 0.1)), 38).splitlines()
    assert tenths == [line[:2] + "".join(c * 2 for c in line[2:]) for line in whole]
    short = text_timeline(_timeline("zbv"), 9).splitlines()
    assert [len(line) for line in short] == [2 + 9] * 2


def test_actions_that_take_no_time_are_not_drawn() -> None:
    assert "B" not in text_timeline(_timeline("gpipe", Work(1, 0, 0)), 20)


def test_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "a.svg"):
        picture(tmp_path / name, {"one": _timeline("zbv"), "two": _timeline("1f1b")})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # A path for each of the 36 and 12 actions, and more for frames and letters.
    assert (tmp_path / "a.svg").read_text().count('<path d="M') > 48


def test_a_stage_without_a_break_is_drawn_without_one(tmp_path: Path) -> None:
    """Edges leave something of bars that are two pixels wide."""
    schedule = make_schedule("1f1b", stages=1, microbatches=300)
    picture(tmp_path / "a.png", {"one": simulate(schedule).timeline})
    pixels = imread(tmp_path / "a.png")[..., :3]
    coloured = pixels.max(-1) - pixels.min(-1) > 0.3
    assert coloured.mean(1).max() > 0.85


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*missing/a.png cannot be written: No such file"):
        picture(tmp_path / "missing" / "a.png", {"one": _timeline("gpipe")})
    with pytest.raises(
        ConfigError, match=r"--out .*a.xyz cannot be written: .*xyz.* not supported"
    ):
        picture(tmp_path / "a.xyz", {"one": _timeline("gpipe")})


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib: install it with .*\[report\]"):
        picture(tmp_path / "a.png", {"one": _timeline("gpipe")})
