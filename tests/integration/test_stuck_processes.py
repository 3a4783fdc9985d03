"""Processes that hang, and signals that come while they do. Two ranks share each layer (tp 2), so
that each step needs both."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from core.checkpoint.reader import open_checkpoint

ROOT = Path(__file__).parents[2]
RUN = ["--device", "cpu", "--precision.dtype", "fp32", "--data.num-workers", "0"]
RUN += ["--data.seq-length", "16", "--data.synthetic", "--train.global-batch-size", "2"]
RUN += ["--train.steps", "100000", "--model.num-layers", "1", "--model.hidden-size", "24"]
RUN += ["--model.vocab-size", "257", "--model.num-attention-heads", "4"]
RUN += ["--model.num-query-groups", "2", "--model.head-dim", "6", "--model.ffn-hidden-size", "16"]
RUN += ["--parallel.tp", "2", "--save", "out"]


@contextmanager
def ranks(folder: Path, *options: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two processes without torchrun, which would kill those that a test looks at: rank 0 holds the
    store."""
    found = []
    for rank in range(2):
        port = 29000 + os.getpid() % 2000
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        found.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "models/llama/train.py"), *RUN, *options],
                cwd=folder,
                env={
                    **os.environ,
                    **{name: str(value) for name, value in variables.items()},
                    "MASTER_ADDR": "127.0.0.1",
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield found
    finally:
        for process in found:
            with suppress(ProcessLookupError):
                process.kill()
            process.communicate()


def wait_for_step(folder: Path, found: list["subprocess.Popen[str]"]) -> None:
    file, deadline = folder / "out/metrics.jsonl", time.monotonic() + 60
    while not (file.exists() and file.read_text().count("\n") > 1):
        assert all(process.poll() is None for process in found), found[0].communicate()
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)


def last_step(folder: Path) -> int:
    rows = (folder / "out/metrics.jsonl").read_text().splitlines()
    step: int = json.loads(rows[-1])["step"]
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_a_stopped_rank_is_named(tmp_path: Path, number: signal.Signals | None) -> None:
    """By the watchdog, or when the other is told to end and cannot save."""
    patience = ["--train.hang-timeout-seconds", "4", "--train.sigterm-grace-seconds", "2"]
    with ranks(tmp_path, *patience) as found:
        wait_for_step(tmp_path, found)
        found[1].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        if number is not None:
            time.sleep(0.3)
            found[0].send_signal(number)
        _, err = found[0].communicate(timeout=30)
        seconds = time.monotonic() - started
        step = last_step(tmp_path)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    if number is not None:
        assert found[0].returncode == 143
        assert 2 < seconds < 8
        said = re.match(
            r"error: rank 0 could not save within [23] s of SIGTERM, being in training of step "
            r"(\d+): ",
            line,
        )
        assert said is not None, line
        assert step < int(said[1]) <= step + 2
        assert not list((tmp_path / "out").glob("step_*"))
        return
    assert found[0].returncode == 1
    assert 4 < seconds < 15
    said = re.match(
        r"error: no step was finished for \d s: rank 1 does not answer: it is stopped, dead or cut "
        r"off; rank 0 waits in (all_reduce|all_gather|reduce_scatter) number \d+ over "
        r"(tp|world|model) \[0, 1\] \([\d,]+ elements\) of step (\d+) for rank 1; if a step",
        line,
    )
    assert said is not None, line
    assert step < int(said[3]) <= step + 2  # the last report comes a step later


@pytest.mark.full
def test_a_stage_says_for_which_it_waits(tmp_path: Path) -> None:
    """torch's flight recorder does not know of the messages of a pipeline's hosts."""
    options = ["--parallel.tp", "1", "--parallel.pp", "2", "--train.hang-timeout-seconds", "4"]
    with ranks(tmp_path, *options) as found:
        wait_for_step(tmp_path, found)
        found[1].send_signal(signal.SIGSTOP)
        _, err = found[0].communicate(timeout=30)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"rank 1 does not answer: .*; rank 0 waits in (the receipt of gradient for piece 0, "
        r"microbatch [01]|sending|all_\w+ .*) of step \d+ for rank 1; if a step",
        line,
    ), line


@pytest.mark.full
def test_sigterm_to_one_rank_saves_on_all(tmp_path: Path) -> None:
    with ranks(tmp_path) as found:
        wait_for_step(tmp_path, found)
        found[1].send_signal(signal.SIGTERM)
        out, err = found[0].communicate(timeout=30)
        assert found[1].wait(30) == 0
    assert found[0].returncode == 0, err
    assert "(another rank was asked to), saved" in out
    assert open_checkpoint(tmp_path / "out").step == last_step(tmp_path)


def test_sigterm_to_one_rank_in_an_evaluation(tmp_path: Path) -> None:
    """The step is saved; the evaluation is left out, and the run says so."""
    options = ["--train.eval-interval", "2", "--train.eval-steps", "1000000"]
    with ranks(tmp_path, *options) as found:
        wait_for_step(tmp_path, found)  # the second row is written before the evaluation
        time.sleep(0.2)
        found[1].send_signal(signal.SIGTERM)
        out, err = found[0].communicate(timeout=30)
        assert found[1].wait(30) == 0
    assert found[0].returncode == 0, err
    assert "step 2 | the evaluation is left out: asked to stop" in out
    assert "stopping at step 2 (another rank was asked to), saved" in out
    assert open_checkpoint(tmp_path / "out").step == 2
