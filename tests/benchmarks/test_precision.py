from pathlib import Path

import pytest

from benchmarks.precision import Report, final_loss, read_record, table, train, train_command

CURVES = {
    "bf16": [(step, 5.0 if step < 10 else 2.0) for step in range(30)],
    "fp8": [(step, 5.0 if step < 10 else 2.01) for step in range(30)],
}


def test_the_final_loss_is_that_of_the_last_steps() -> None:
    assert final_loss(CURVES["bf16"]) == pytest.approx(2.0)
    rows = table(CURVES).splitlines()
    assert rows[1].split()[-1] == "+0.000%"
    assert rows[2].split()[-1] == "+0.500%"


def test_runs_differ_in_their_format_alone() -> None:
    places = Path("corpus"), Path("save")
    one, two = (train_command(Report(), name, *places) for name in ("bf16", "fp32"))
    assert [a for a, b in zip(one, two, strict=True) if a != b] == ["bf16"]


@pytest.mark.full
def test_formats_are_trained_and_a_failed_run_loses_no_other(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = Report(
        out=tmp_path,
        runs=("fp8-te", "bf16"),  # without Transformer Engine the first is refused
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
    assert [step for step, _ in curves["bf16"]] == [1, 2, 3, 4]
    assert "fp8-te" not in curves
    assert "== fp8-te: exit status 2" in capfd.readouterr().out
