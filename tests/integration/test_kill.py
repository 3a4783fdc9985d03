"""kill -9 at random moments under `torchrun --max-restarts`: the run goes on by itself, and what
comes out at the end is, bit by bit, what comes out of a run that nobody disturbed."""

import json
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from core.testing.launched_run import LaunchedRun

SAVE_INTERVAL = 5
OPTIONS = f"""
    --device cpu --precision.dtype fp32 --parallel.tp 2 --data.num-workers 0 --data.seq-length 16
    --data.train corpus --train.global-batch-size 4 --train.micro-batch-size 2
    --train.eval-interval 15 --train.eval-steps 1 --train.save-interval {SAVE_INTERVAL}
    --model.num-layers 1 --model.hidden-size 24
    --model.vocab-size 257 --model.num-attention-heads 4 --model.num-query-groups 2
    --model.head-dim 6 --model.ffn-hidden-size 16 --model.hidden-dropout 0.1
""".split()
OF_TIME = (
    "save_seconds",
    "step_seconds",
    "tokens_per_second",
    "tflops_causal",
    "tflops_full",
    "memory_gib",
)


def launched(folder: Path, save: str, steps: int, *rendezvous: str, **more: Any) -> LaunchedRun:
    """A run in the folder of the samples."""
    return LaunchedRun(folder, folder / save, steps, OPTIONS, rendezvous, **more)


def kill_one(
    run: LaunchedRun, processes: int, attempt: int, kills: int, rng: random.Random
) -> bool:
    """Let an attempt begin to train, then kill one of its ranks; returns whether in mid-save."""
    before, _ = run.rows_written() if attempt else (0, 0)
    run.until("all workers", lambda: len(run.workers(attempt)) == processes)
    run.until("a metrics file", lambda: run.rows_written()[0] != before)
    first = run.rows_written()[1]
    # Six steps are kept for each kill to come: it falls into the next save at the latest.
    spare = run.steps - run.last_step() - 6 * (kills - attempt)
    in_save = attempt % 2 == 1
    rows = first + 1 + (0 if in_save else rng.randint(0, max(0, min(8, spare))))
    run.until("a step", lambda: run.rows_written()[1] >= rows)
    if in_save:
        run.until("a save", run.saving, every=0.001)
        time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.02)]))
    else:
        time.sleep(rng.uniform(0.0, 0.05))
    victim = run.workers(attempt)[rng.randrange(processes)]
    saving = run.saving()
    os.kill(victim, signal.SIGKILL)
    return saving


def rows(save: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in OF_TIME} for row in lines]


def weights_and_states(save: Path, step: int) -> dict[str, bytes]:
    files = (save / f"step_{step:08d}").glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("processes", "steps", "kills"),
    # 31 times four processes import torch.
    [(2, 20, 2), pytest.param(4, 200, 30, marks=[pytest.mark.full, pytest.mark.timeout(1500)])],
)
def test_killed_at_random_moments(
    samples: Path, tmp_path: Path, processes: int, steps: int, kills: int
) -> None:
    """At tp 2, with one replica or two; in turns in a step and in a save."""
    (tmp_path / "corpus.bin").symlink_to(samples / "corpus.bin")
    (tmp_path / "corpus.idx").symlink_to(samples / "corpus.idx")
    alone = ("--standalone", "--nproc-per-node", str(processes))
    with launched(tmp_path, "whole", steps, *alone) as whole:
        assert whole.process.wait(120) == 0, whole.log()
    rng = random.Random(steps)
    saving, pauses = [], []
    with launched(tmp_path, "killed", steps, *alone, restarts=kills) as killed:
        for attempt in range(kills):
            saving.append(kill_one(killed, processes, attempt, kills, rng))
            died = time.monotonic()
            killed.until_restarted(attempt + 1)
            pauses.append(time.monotonic() - died)
        assert killed.process.wait(120) == 0, killed.log()
    print(f"{kills} kills, {sum(saving)} in mid-save; restarts after {max(pauses):.1f} s at most")
    # A save may be over before the kill: at least half of those that were aimed at one hit.
    assert sum(saving) >= kills // 4
    assert max(pauses) < 20
    assert len(rows(whole.save)) == steps + steps // 15 + (steps % 15 > 0)
    assert rows(killed.save) == rows(whole.save)
    tensors = weights_and_states(whole.save, steps)
    assert tensors
    assert weights_and_states(killed.save, steps) == tensors
    assert not list(killed.save.glob(".step_*"))


@pytest.mark.full
def test_a_machine_whose_rank_was_killed_comes_back(samples: Path, tmp_path: Path) -> None:
    """Two machines, as torchrun sees them. It counts restarts on each by itself, so that their
    numbers differ from then on."""
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).symlink_to(samples / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous: tuple[str, ...] = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test")
    rendezvous += ("--rdzv-endpoint", f"localhost:{port}", "--nproc-per-node", "2")
    one, two = (
        launched(tmp_path, "run", 60, *rendezvous, restarts=3, node=node) for node in range(2)
    )
    with one, two:
        one.until("a step", lambda: one.rows_written()[1] > 7)
        before, _ = one.rows_written()
        os.kill(max(two.workers(0).items())[1], signal.SIGKILL)
        one.until("restart", lambda: one.rows_written()[0] != before)
        assert [one.process.wait(120), two.process.wait(120)] == [0, 0], one.log() + two.log()
    assert [row["step"] for row in rows(one.save) if "loss" in row] == list(range(1, 61))
    assert weights_and_states(one.save, 60)
