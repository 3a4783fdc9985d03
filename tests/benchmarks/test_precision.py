from pathlib import Path

import pytest

from benchmarks.precision import (
    Curve,
    Report,
    final_loss,
    mean_curve,
    read_record,
    table,
    train,
    train_command,
)


def _curve(final: float) -> Curve:
    return [(step, 5.0 if step < 10 else final) for step in range(30)]


def test_the_final_loss_is_that_of_the_last_steps() -> None:
    assert final_loss(_curve(2.0)) == pytest.approx(2.0)


def test_differences_are_taken_seed_by_seed() -> None:
    curves = {
        "bf16": {1: _curve(2.0), 2: _curve(4.0), 3: _curve(1.0)},
        "fp8": {1: _curve(2.01), 2: _curve(3.96)},  # the third failed
        "fp32": {2: _curve(4.02)},
    }
    rows = [line.split() for line in table(curves).splitlines()]
    assert rows[1][-3:] == ["+0.000%", "0.000%", "+0.000%"]
    # +0.5 % and -1 %: a mean of -0.25 %, whose standard error is half of what is between them.
    assert rows[2][-3:] == ["-0.250%", "0.750%", "-1.000%"]
    assert rows[3][-1] == "+0.500%"  # of one seed nothing is known of the error
    step, loss = mean_curve(curves["bf16"].values())[-1]
    assert step == 29
    assert loss == pytest.approx(7 / 3)


def test_runs_differ_in_their_format_alone() -> None:
    places = Path("corpus"), Path("save")
    names = "bf16", "fp32", "bf16-again"
    one, two, three = (train_command(Report(), name, 3, *places) for name in names)
    assert [a for a, b in zip(one, two, strict=True) if a != b] == ["bf16"]
    assert [(a, b) for a, b in zip(one, three, strict=True) if a != b] == [("8", "4")]


@pytest.mark.full
def test_formats_are_trained_and_a_failed_run_loses_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = Report(
        out=tmp_path,
        runs=("fp8-te", "bf16"),  # without Transformer Engine the first is refused
        seeds=(1, 2),
        jobs=2,
        steps=4,
        layers=1,
        hidden_size=64,
        seq_length=32,
        batch_size=2,
        data_mb=1,
        device="cpu",
    )
    record = tmp_path / "losses.jsonl"
    train(report, record)
    curves = read_record(record)
    for seed in (1, 2):
        assert [step for step, _ in curves["bf16"][seed]] == [1, 2, 3, 4]
    assert curves["bf16"][1] != curves["bf16"][2]
    assert "fp8-te" not in curves
    assert "== fp8-te, seed 2: exit status 2" in capfd.readouterr().out
