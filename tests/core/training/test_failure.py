import errno
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from core.errors import DataError
from core.training import failure
from core.training.failure import (
    SAVING,
    FailureBoard,
    Patience,
    SentenceHandler,
    Watchdog,
    exit_now,
)
from core.training.interrupts import StopRequest


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "_AFTER_THE_CAUSE_SECONDS", 0.01)
    monkeypatch.setattr(failure, "_LOOK_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(failure, "_ANSWER_OF_A_RANK_SECONDS", 0.5)
    monkeypatch.setattr(failure, "_ANSWER_AFTER_SIGTERM_SECONDS", 1.0)


@pytest.fixture
def error_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    return path


def message(path: Path) -> str:
    text: str = json.loads(path.read_text())["message"]["message"]
    return text


def test_the_first_failure_stays_on_the_board() -> None:
    store = HashStore()
    boards = [FailureBoard(rank, store) for rank in range(3)]
    assert boards[0].read() is None
    assert boards[2].post("two") == (2, "two")
    assert boards[1].post("one") == (2, "two")
    assert boards[0].read() == (2, "two")


def test_only_the_first_failing_rank_speaks(
    error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = HashStore()
    SentenceHandler(FailureBoard(1, store)).record_exception(DataError("a.bin is damaged"))
    assert message(error_file) == "a.bin is damaged"
    assert capsys.readouterr().err == "error: a.bin is damaged\n"
    SentenceHandler(FailureBoard(0, store)).record_exception(RuntimeError("connection closed"))
    assert message(error_file) == "rank 0 stopped because rank 1 failed: a.bin is damaged"
    assert capsys.readouterr().err == ""


def test_an_unexpected_error_keeps_its_traceback(
    error_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise KeyError("absent")
    except KeyError as error:
        SentenceHandler().record_exception(error)
    assert "test_failure.py" in message(error_file)
    assert capsys.readouterr().err.endswith("KeyError: 'absent'\n")


def test_a_mistake_before_ranks_meet_is_printed_once(
    error_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    SentenceHandler().record_exception(DataError("a.bin is damaged"))
    assert message(error_file) == "a.bin is damaged"
    assert capsys.readouterr().err == ""


def watchdog(
    handler: SentenceHandler, statuses: "Queue[int]", hang: float = 0.0, sigterm: float = 0.0
) -> Watchdog:
    return Watchdog(Patience(hang, sigterm), handler, StopRequest(), {}, statuses.put)


def test_a_hang_is_named(error_file: Path) -> None:
    left: Queue[int] = Queue()
    dog = watchdog(SentenceHandler(FailureBoard(4, None)), left, hang=0.8)
    dog.start()
    for _ in range(11):  # longer than the limit, but alive
        dog.beat(7, "training")
        time.sleep(0.08)
    assert left.empty()
    dog.beat(8, "evaluation")
    assert left.get(timeout=5.0) == 1
    dog.stop()
    assert message(error_file).startswith(
        "no step was finished for 1 s: rank 4 is in evaluation of step 8, and in no collective; if"
    )


def test_ranks_say_where_they_stand_when_one_asks(error_file: Path) -> None:
    """Rank 0 finds the hang, rank 1 is alive and answers, rank 2 does not."""
    store = HashStore()
    left: Queue[int] = Queue()
    dogs = [
        watchdog(SentenceHandler(FailureBoard(rank, store, 3)), left, hang=limit)
        for rank, limit in ((0, 0.8), (1, 60.0))
    ]
    for dog in dogs:
        dog.start()
        dog.beat(5, "training")
    assert [left.get(timeout=10.0), left.get(timeout=10.0)] == [1, 1]
    for dog in dogs:
        dog.stop()
    first = FailureBoard(1, store).read()
    assert first is not None
    assert first[0] == 0
    assert "s: rank 2 does not answer: it is stopped, dead or cut off; if" in first[1]


def test_the_second_asks_if_the_first_went_silent(error_file: Path) -> None:
    store = HashStore()
    assert FailureBoard(0, store, 2).call_for_states("hang") == 0
    left: Queue[int] = Queue()
    dog = watchdog(SentenceHandler(FailureBoard(1, store, 2)), left, hang=0.2)
    dog.start()
    assert left.get(timeout=15.0) == 1
    dog.stop()
    assert "rank 0 does not answer" in message(error_file)


def test_another_rank_failing_ends_this_one() -> None:
    store = HashStore()
    left: Queue[int] = Queue()
    dog = watchdog(SentenceHandler(FailureBoard(0, store)), left)
    FailureBoard(1, store).post("broken")
    dog.start()
    assert left.get(timeout=5.0) == 1
    dog.stop()


def test_a_store_that_is_gone_ends_nothing() -> None:
    def gone(*args: Any) -> None:
        raise RuntimeError("connection refused")

    board = FailureBoard(0, SimpleNamespace(check=gone, compare_set=gone))  # type: ignore[arg-type]
    left: Queue[int] = Queue()
    dog = watchdog(SentenceHandler(board), left)
    dog.start()
    time.sleep(0.5)
    assert left.empty()
    dog.stop()
    assert board.post("broken") == (0, "broken")


def test_a_hang_is_named_without_a_store(error_file: Path) -> None:
    def gone(*args: Any) -> None:
        raise RuntimeError("connection refused")

    board = FailureBoard(1, SimpleNamespace(check=gone, compare_set=gone), 2)  # type: ignore[arg-type]
    left: Queue[int] = Queue()
    dog = watchdog(SentenceHandler(board), left, hang=0.4)
    dog.start()
    assert left.get(timeout=5.0) == 1
    dog.stop()
    assert "rank 1 is in start of step 0" in message(error_file)


@pytest.mark.parametrize("phase", ["training", SAVING])
def test_a_border_that_is_not_reached_after_sigterm(error_file: Path, phase: str) -> None:
    """The main thread is stuck; a save that has begun is left alone."""
    left: Queue[int] = Queue()
    with StopRequest() as stop:
        handler = SentenceHandler(FailureBoard(2, None))
        dog = Watchdog(Patience(0.0, 0.5), handler, stop, {}, left.put)
        dog.start()
        dog.beat(3, phase)
        signal.raise_signal(signal.SIGTERM)
        if phase == SAVING:
            time.sleep(1.2)
            assert left.empty()
        else:
            assert left.get(timeout=5.0) == 143
            text = message(error_file)
            assert re.match("rank 2 could not save within . s of SIGTERM, being in training", text)
        dog.stop()


@pytest.mark.parametrize("dead", [True, False])
def test_after_sigterm_nobody_waits_for_a_rank_that_is_dead(error_file: Path, dead: bool) -> None:
    """Gloo and NCCL do not always notice; the ranks that are left ask each other."""
    store = HashStore()
    left: Queue[int] = Queue()
    other = watchdog(SentenceHandler(FailureBoard(1, store, 2)), Queue())
    if not dead:
        other.start()
    with StopRequest() as stop:
        handler = SentenceHandler(FailureBoard(0, store, 2))
        dog = Watchdog(Patience(0.0, 60.0), handler, stop, {}, left.put)
        dog.start()
        dog.beat(3, "training")
        signal.raise_signal(signal.SIGTERM)
        if dead:
            assert left.get(timeout=10.0) == 143
            assert "of SIGTERM, since rank 1 does not answer: the" in message(error_file)
        else:
            time.sleep(2.0)
            assert left.empty()
        dog.stop()
    other.stop()


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_keeps_no_process_alive(
    error_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(sys, "stdout", FullDisk())
    monkeypatch.setattr(sys, "stderr", FullDisk())
    SentenceHandler().record_exception(DataError("a.bin is damaged"))
    assert message(error_file) == "a.bin is damaged"
    exit_now(3)
    assert left == [3]


def test_a_hang_ends_the_run_though_torch_tells_nothing(
    error_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("retired")

    monkeypatch.setattr(failure, "rank_state", fail)
    left: Queue[int] = Queue()
    dog = watchdog(SentenceHandler(FailureBoard(0, None)), left, hang=0.2)
    dog.beat(7, "training")
    dog.start()
    assert left.get(timeout=10) == 1
    dog.stop()
    assert "rank 0 is in training of step 7" in message(error_file)
