import errno
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.errors import ConfigError, TrainingError
from core.testing.disk import disk_with_room_for
from core.training.metrics import (
    METRICS_FILE,
    TRACKERS,
    Console,
    JsonlTracker,
    Reporter,
    Throughput,
    TrackedRun,
    check_trackers,
    peak_tflops,
    remaining,
)


def run(folder: Path | None, first_step: int = 0) -> TrackedRun:
    return TrackedRun("name", "project", folder, {"lr": 0.1}, first_step)


def test_the_log_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)))
    tracker = JsonlTracker(run(tmp_path, first_step=2))
    tracker.log(3, {"loss": float("nan"), "lr": 0.5})
    tracker.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": None, "lr": 0.5},
    ]


def test_a_row_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    JsonlTracker(run(tmp_path, first_step=5)).close()
    assert file.read_text() == '{"step": 1}\n'


def test_rates_follow_both_conventions() -> None:
    rates = Throughput(2e9, 3e9, world_size=4, peak=10.0).rates(tokens=8000, seconds=2.0, steps=4)
    assert rates == {
        "step_seconds": 0.5,
        "tokens_per_second": 4000.0,
        "tflops_causal": pytest.approx(2.0),
        "mfu_causal": pytest.approx(0.2),
        "tflops_full": pytest.approx(3.0),
        "mfu_full": pytest.approx(0.3),
    }


def test_a_cpu_has_no_peak() -> None:
    assert peak_tflops(torch.device("cpu"), torch.bfloat16) is None
    assert not any("mfu" in name for name in Throughput(1.0, 1.0, 1, None).rates(1, 1.0, 1))


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H200", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA X", None)]
)
def test_peak_by_device_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), torch.bfloat16) == peak
    assert peak_tflops(torch.device("cuda", 0), torch.float32) is None


class Recorder(SimpleNamespace):
    """Stands for a tracker's package: remembers every call."""

    def __init__(self) -> None:
        super().__init__(calls=[])

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> "Recorder":
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_trackers_pass_rows_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    package = Recorder()
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, package)
    tracker = TRACKERS[name](run(tmp_path, first_step=3))
    tracker.log(4, {"loss": 2.0})
    tracker.close()
    row = {
        "tensorboard": ("add_scalar", ("loss", 2.0, 4), {}),
        "trackio": ("log", ({"loss": 2.0},), {"step": 4}),
        "wandb": ("log", ({"loss": 2.0},), {"step": 4}),
        "mlflow": ("log_metrics", ({"loss": 2.0},), {"step": 4}),
    }[name]
    assert row in package.calls
    end = {"tensorboard": "close", "mlflow": "end_run"}.get(name, "finish")
    assert package.calls[-1][0] == end
    if name == "tensorboard":
        expected = ("SummaryWriter", (str(tmp_path / name),), {"purge_step": 4})
        assert package.calls[0] == expected


@dataclass
class Lost:
    """A tracker whose server goes out of reach."""

    rows: list[int] = field(default_factory=list)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step > 1:
            raise ConnectionError("no route to host")
        self.rows.append(step)

    def close(self) -> None:
        raise AssertionError("nobody listens")


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, file = Lost(), JsonlTracker(run(tmp_path))
    reporter = Reporter(Console(enabled=True), Throughput(1.0, 1.0, 1, None), torch.device("cpu"))
    reporter.trackers = [lost, file]
    for step in (1, 2, 3):
        reporter.evaluation(step, {"loss": 2.0})
    reporter.close()
    assert lost.rows == [1]
    assert [json.loads(row)["step"] for row in (tmp_path / METRICS_FILE).open()] == [1, 2, 3]
    out = capsys.readouterr().out
    assert out.count("Lost failed and gets no more metrics: ConnectionError: no route to host") == 1


def test_a_full_disk_under_the_log_ends_the_run_with_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JsonlTracker(run(tmp_path))
    reporter = Reporter(Console(enabled=False), Throughput(1.0, 1.0, 1, None), torch.device("cpu"))
    reporter.trackers = [file]
    with disk_with_room_for(0):
        with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written"):
            reporter.evaluation(1, {"loss": 2.0})
        reporter.close()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--train.track mlflow needs the package mlflow"):
        check_trackers(("mlflow",))


def test_a_reader_that_has_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        console = Console(enabled=True, total_steps=4)
        console.say("hello")
        console.advance(2, "loss 1.0")
        patch.undo()
        with pytest.raises(BrokenPipeError):
            pipe.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # closing writes what is left


def test_a_terminal_has_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    console = Console(enabled=True, total_steps=4)
    console.start(1)
    console.advance(2, "loss 1.0")
    console.say("hello")
    console.advance(4, "loss 0.5")
    console.close()
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert "4/4" in err
    assert "loss 0.5" in err


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=False, total_steps=4)
    console.start(0)
    console.say("hello")
    console.advance(1, "loss 1.0")
    console.close()
    assert capsys.readouterr() == ("", "")


def test_time_left() -> None:
    assert remaining(0.5, 7323) == "1:01:02 left"


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracker = JsonlTracker(run(tmp_path))

    def full(text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = SimpleNamespace(write=full, name="run/metrics.jsonl")
    monkeypatch.setattr(tracker, "_file", file)
    with pytest.raises(TrainingError, match=r"run/metrics.jsonl cannot be written \(No space left"):
        tracker.log(1, {"loss": 1.0})
