"""A full disk and dying processes: nothing half-written, and the cause last on the terminal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.checkpoint.reader import open_checkpoint
from core.testing.disk import disk_with_room_for
from core.testing.terminal import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")

ROOT = Path(__file__).parents[2]
TRAIN = "models/llama/train.py"
RUN = ["--device", "cpu", "--precision.dtype", "fp32", "--data.num-workers", "0"]
RUN += ["--data.seq-length", "16", "--train.global-batch-size", "2", "--train.steps", "2"]
RUN += ["--model.num-layers", "1", "--model.hidden-size", "24", "--model.vocab-size", "257"]
RUN += ["--model.num-attention-heads", "4", "--model.num-query-groups", "2"]
RUN += ["--model.head-dim", "6", "--model.ffn-hidden-size", "16"]


# ---- A full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [100, 3000, 60_000])
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("converters", "import hf out --tp 2"),
        ("converters", "export native out"),
        ("core.data.preprocess", "--input many.jsonl --output out --tokenizer byte --workers 0"),
        ("core.data.preprocess", "--input many.jsonl --output out --tokenizer byte --workers 1"),
    ],
)
def test_a_full_disk(terminal: Terminal, name: str, argv: str, room: int) -> None:
    Path("many.jsonl").write_text((json.dumps({"text": "many words " * 10}) + "\n") * 2000)
    with disk_with_room_for(room):
        sentence = terminal.refused(name, *argv.split())
    assert re.search(
        r"\bout (could not|cannot) be written \(File too large\).*free disk space", sentence
    )


def test_a_full_disk_at_the_start_of_a_run(terminal: Terminal) -> None:
    Path("run").mkdir()
    with disk_with_room_for(100):
        sentence = terminal.refused(TRAIN, *RUN, "--data.synthetic", "--save", "run")
    assert re.search("run cannot be written .* choose another folder with --save", sentence)


def test_a_full_disk_in_mid_save(terminal: Terminal) -> None:
    """What was saved before stays, and the run goes on from there when there is room again."""
    synthetic = [*RUN, "--data.synthetic", "--save", "run"]
    assert terminal.run(TRAIN, *synthetic)[0] == 0
    before = sorted(os.listdir("run"))
    size = max(path.stat().st_size for path in Path("run/step_00000002").iterdir())
    for room in (size // 2, size - 1):  # the weights do not fit, or their last byte
        with disk_with_room_for(room):
            status, err = terminal.run(TRAIN, *synthetic, "--train.steps", "4")
        assert status == 1
        (line,) = err.splitlines()
        assert line.startswith("error: run/step_00000004 was not saved, rank 0 failed: 'File too l")
        assert "free disk space" in line
        assert sorted(os.listdir("run")) == before
    assert terminal.run(TRAIN, *synthetic, "--train.steps", "4")[0] == 0
    assert open_checkpoint(Path("run")).step == 4


def test_a_full_disk_under_the_sample_index(terminal: Terminal) -> None:
    options = [*RUN, "--data.train", "corpus", "--save", "out"]
    with disk_with_room_for(300):
        sentence = terminal.refused(TRAIN, *options)
    assert "cannot keep prepared data in cache" in sentence
    assert terminal.run(TRAIN, *options)[0] == 0


# ---- Several processes ---------------------------------------------------------------------------


@contextmanager
def torchrun(*argv: str) -> Iterator["subprocess.Popen[str]"]:
    """A run on two processes, which leaves no process behind."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", str(ROOT / TRAIN), *RUN, *argv],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate()


def last_line(err: str) -> str:
    """What stands last on the terminal, above the border of torchrun's block."""
    *_, line, border = err.strip().splitlines()
    assert set(border) == {"="}
    return line.strip()


def rank_pids(run: "subprocess.Popen[str]") -> dict[int, int]:
    """The processes of a run by rank."""
    found = {}
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in map(int, children):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        found.update(dict.fromkeys(ranks, pid))
    return found


def wait_for_step(folder: Path, run: "subprocess.Popen[str]") -> None:
    file, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while not (file.exists() and file.read_text().count("\n") > 1):
        assert run.poll() is None, "the run ended"
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.05)


def test_an_unknown_option_is_told_whichever_process_is_first(terminal: Terminal) -> None:
    with torchrun("--data.synthetic", "--train.step", "3", "--save", "out") as run:
        _, err = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "traceback : Unrecognized options: --train.step, 3; perhaps you" in last_line(err)
    assert last_line(err).endswith("--train.steps or --train.trace-step")
    assert not Path("out").exists()


def test_one_rank_failing_ends_all(terminal: Terminal) -> None:
    """By a mistake that is only found in mid-run: a token above the vocabulary."""
    shutil.copy("corpus.idx", "bad.idx")
    Path("bad.bin").write_bytes(b"\x41\x00" * (Path("corpus.bin").stat().st_size // 2))
    options = ["--data.train", "bad", "--model.vocab-size", "100", "--train.steps", "100000"]
    with torchrun(*options, "--save", "out", "--train.log-interval", "1") as run:
        wait_for_step(Path("out"), run)
        started = time.monotonic()
        with Path("bad.bin").open("r+b") as tokens:  # mapped by the run
            tokens.write(b"\xff\x00" * (Path("bad.bin").stat().st_size // 2))
        _, err = run.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert run.returncode == 1
    assert "bad.bin holds token 255, but the vocabulary has 100" in last_line(err)
    assert not list(Path("out").glob("*step_*"))


@pytest.mark.parametrize("axis", [pytest.param("tp", marks=pytest.mark.full), "pp"])
def test_a_killed_rank_ends_all(terminal: Terminal, axis: str) -> None:
    options = ["--data.synthetic", "--train.steps", "100000", f"--parallel.{axis}", "2"]
    with torchrun(*options, "--save", "out", "--train.save-interval", "1") as run:
        wait_for_step(Path("out"), run)
        started, victim = time.monotonic(), rank_pids(run)[1]
        os.kill(victim, signal.SIGKILL)
        _, err = run.communicate(timeout=60)
    assert time.monotonic() - started < 20
    assert run.returncode == 1
    assert last_line(err).endswith(f"Signal 9 (SIGKILL) received by PID {victim}")
    assert "(local_rank: 1)" in err[err.rindex("Root Cause") :]
    step = open_checkpoint(Path("out")).step  # whole, whatever the kill came upon
    assert step >= 1
    status, _ = terminal.run(
        TRAIN, *RUN, "--data.synthetic", "--save", "out", "--train.steps", str(step + 1)
    )
    assert status == 0
    assert not list(Path("out").glob(".step_*"))
