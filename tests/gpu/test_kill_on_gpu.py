"""kill -9 of a rank whose peer then waits in an NCCL collective."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from core.testing.launched_run import LaunchedRun

OPTIONS = [
    *("--preset", "tiny", "--device", "cuda", "--precision.dtype", "bf16", "--parallel.tp", "2"),
    *("--data.synthetic", "--data.num-workers", "0", "--data.seq-length", "256"),
    *("--train.global-batch-size", "4", "--train.save-interval", "10", "--train.deterministic"),
    *("--train.hang-timeout-seconds", "120"),
]
STEPS = 60


def _run(folder: Path, name: str, restarts: int) -> LaunchedRun:
    rendezvous = ("--standalone", "--nproc-per-node", "2")
    return LaunchedRun(folder, folder / name, STEPS, OPTIONS, rendezvous, restarts)


def _losses(save: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (save / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.multi_gpu
def test_a_killed_rank_is_replaced_and_the_run_repeats_itself(tmp_path: Path) -> None:
    with _run(tmp_path, "whole", 0) as whole:
        assert whole.process.wait(300) == 0, whole.log()
    with _run(tmp_path, "killed", 2) as killed:
        killed.until("steps", lambda: killed.rows_written()[1] > 25, 200)
        os.kill(killed.workers(0)[1], signal.SIGKILL)
        died = time.monotonic()
        killed.until_restarted(1)
        pause = time.monotonic() - died
        assert killed.process.wait(300) == 0, killed.log()
    print(f"workers were there again {pause:.1f} s after the kill")
    assert pause < 40
    assert len(_losses(whole.save)) == STEPS
    assert _losses(killed.save) == _losses(whole.save)
