import subprocess
import sys
from pathlib import Path

import pytest

from core.pipeline.__main__ import main
from core.pipeline.costs import Work
from core.pipeline.schedules import make_schedule
from core.pipeline.simulate import Costs, simulate
from core.pipeline.trace import write_trace

ZBV = ["--schedule", "zbv", "--stages", "4", "--microbatches", "16"]


def _show(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(["show", *argv])
    return capsys.readouterr().out


def _refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(["show", *argv])
    out, err = capsys.readouterr()
    assert left.value.code in (1, 2)
    assert not out
    assert len(err.splitlines()) == 1
    return err


def test_nothing_loads_torch() -> None:
    code = (
        "import sys\n"
        "from core.pipeline.__main__ import main\n"
        "import core.pipeline.layout, core.pipeline.schedules, core.pipeline.simulate\n"
        "main(['show', '--schedule', 'zb_h1', '--stages', '2', '--microbatches', '4'])\n"
        "assert 'matplotlib' not in sys.modules\n"
        "try: main(['show', '--help'])\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--microbatches" in done.stdout


def test_table_and_text_timeline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = _show(capsys, *ZBV)
    assert "bubble 3.03%, time 99, at most 8 live activations" in out
    assert ["3", "97.0%", "8"] in [line.split() for line in out.splitlines()]
    assert "0 FFFFFFFfiwfiwfiwfiwFIWfiw" in out


def test_costs_and_transfer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--schedule", "1f1b", "--stages", "2", "--microbatches", "2"]
    assert "time 15" in _show(capsys, *options, "--costs", "2,1,2")
    # The longest path crosses over and back once.
    assert "time 16" in _show(capsys, *options, "--costs", "2,1,2", "--transfer", "0.5")


def test_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    out = _show(capsys, *ZBV, "--layout", "Et*2|(t*2|)*6tL", "--layers", "15", "--costs", "1,2,1")
    assert "t*2 | t*2" in out
    assert "parameters" not in out
    # 6 layers on each stage, or 2 and the head.
    balanced = _show(capsys, *ZBV, "--layers", "20", "--head-cost", "4")
    assert "100.0% of the time" in balanced


def test_a_picture_in_place_of_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = _show(capsys, *ZBV, "--out", str(tmp_path / "a.png"))
    assert "drawn: " in out
    assert "FFFF" not in out
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_measured_timeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schedule = make_schedule("zbv", stages=4, microbatches=16)
    slow = simulate(schedule, Costs(work=Work(1.5, 1.5, 1.5), transfer=0.25))
    write_trace(tmp_path / "t.json", "zbv", slow.timeline)
    out = _show(capsys, *ZBV, "--from-trace", str(tmp_path / "t.json"))
    # Simulated with the measured times, those of messages too.
    assert f"bubble {slow.bubble:.2%}, time {slow.makespan:g}" in out
    assert f"measured: bubble {slow.bubble:.2%}, {slow.makespan:.3f} ms; in the sch" in out
    assert "zbv, measured in ms" in out
    out = _show(capsys, *ZBV, "--from-trace", str(tmp_path / "t.json"), "--transfer", "0")
    assert "bubble 3.03%, time 148.5" in out
    out = _show(capsys, *ZBV, "--from-trace", str(tmp_path / "t.json"), "--costs", "1,1,1")
    assert "time 99" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schedule", "zbw"], "there is no schedule zbw: perhaps you meant zbv"),
        (["--chunks", "3"], "zbv cannot serve 3 chunks per stage"),
        (["--stages", "0"], "0 stages"),
        (["--microbatches", "0"], "0 microbatches"),
        (["--costs", "1,1"], "--costs 1,1 must be three numbers"),
        (["--costs", "1,nan,1"], "each number must be finite and above 0"),
        (["--costs", "0,1,1"], "each number must be finite and above 0"),
        (["--transfer", "-1"], "--transfer is -1.0"),
        (["--head-cost", "2"], "--head-cost does nothing without"),
        (["--head-cost", "-2", "--layers", "9"], "--head-cost is -2.0"),
        (["--head-cost", "0", "--layout", "E|||||||L"], "nothing here takes any time"),
        (["--layers", "0"], "--layers is 0"),
        (["--layers", "5"], "4 stages of 2 chunks hold 8 pieces, but the model, E t*5 L, has 7"),
        (["--layout", "Et|tL"], "has 2 pieces"),
        (["--layout", "E|t|t|t|t|t|t|L", "--layers", "9"], "names t 6 times, but the model"),
        (["--layout", ""], "has 1 pieces"),
        (["--from-trace", "missing.json"], "missing.json cannot be read"),
        (["--out", "timeline.xyz"], "not supported"),
        (["--microbatch", "3"], "--microbatch"),
    ],
)
def test_mistakes_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in _refused(capsys, *ZBV, *argv)
