"""How a run fails: the first failing rank's sentence comes last on the terminal, and the other
ranks do not wait for it in a collective.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, yet not re-exported
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from core.errors import TesseraError, TrainingError
from core.parallel.rendezvous import Rendezvous
from core.pipeline.p2p import Waiting
from core.training.hang import Groups, RankState, diagnose, rank_state
from core.training.interrupts import StopRequest

# torchrun orders failures by whole seconds: who fails because another did must come later.
_AFTER_THE_CAUSE_SECONDS = 1.1
_LOOK_EVERY_SECONDS = 1.0  # or more often, where patience is short
_ANSWER_OF_THE_STORE = timedelta(seconds=10)
_ANSWER_OF_A_RANK_SECONDS = 2.5
# Longer: a rank that is alive, but busy in C code that lets no thread run, shall not cost a save.
_ANSWER_AFTER_SIGTERM_SECONDS = 10.0
_HANG, _SIGTERM = "hang", "sigterm"

SAVING = "saving"
"""The phase in which a checkpoint is written."""


class FailureBoard:
    """What ranks tell each other by the store when collectives no longer work: the first failure of
    the run (rank, sentence), and when it hangs, where each stands.

    A connection of its own, so that no thread waits for another's call.
    """

    def __init__(self, rank: int, store: Store | None, size: int = 1) -> None:
        """The board of a process; without a store it is alone."""
        self.rank, self.size = rank, size
        self._store = store
        self._key = "tessera/failure"

    @classmethod
    def connect(cls, met: Rendezvous | None) -> "FailureBoard":
        """The board of the processes that met; those of an earlier start had another."""
        if met is None:
            return cls(0, None)
        return cls(met.rank, met.connect(_ANSWER_OF_THE_STORE), met.size)

    def post(self, sentence: str) -> tuple[int, str]:
        """Report a failure of this rank; returns the first one reported by any."""
        own = json.dumps([self.rank, sentence])
        try:
            first = own if self._store is None else self._store.compare_set(self._key, "", own)
            rank, text = json.loads(first)
        except (dist.DistError, RuntimeError):
            return self.rank, sentence  # the store has gone with the process that held it
        return rank, text

    def read(self) -> tuple[int, str] | None:
        """The first failure reported, if any."""
        if self._store is None or not self._store.check([self._key]):
            return None
        rank, text = json.loads(self._store.get(self._key))
        return rank, text

    def call_for_states(self, cause: str) -> int:
        """Ask all ranks where they stand; returns the rank that was the first to ask."""
        if self._store is None:
            return self.rank
        return int(self._store.compare_set(f"tessera/{cause}/asked", "", str(self.rank)))

    def states_are_called_for(self, cause: str) -> bool:
        """Whether a rank has asked."""
        return self._store is not None and self._store.check([f"tessera/{cause}/asked"])

    def post_state(self, cause: str, state: RankState) -> None:
        """Answer."""
        if self._store is not None:
            self._store.set(f"tessera/{cause}/state/{self.rank}", state.to_json())

    def states(self, cause: str) -> dict[int, RankState | None]:
        """The answers of all ranks, None where there is none."""
        found: dict[int, RankState | None] = dict.fromkeys(range(self.size))
        if self._store is not None:
            for rank in found:
                key = f"tessera/{cause}/state/{rank}"
                if self._store.check([key]):
                    found[rank] = RankState.from_json(self._store.get(key).decode())
        return found


class SentenceHandler(ErrorHandler):
    """Gives torchrun one sentence for an error that a user can cause, a traceback for any other."""

    def __init__(self, board: FailureBoard | None = None) -> None:
        self.board = board

    def record_exception(self, e: BaseException) -> None:
        """Say on standard error what happened, unless another rank's failure caused it, and leave
        it where torchrun looks.
        """
        expected = isinstance(e, TesseraError)
        text = str(e) if expected else "".join(traceback.format_exception(e)).rstrip()
        if self.board is not None:
            if not expected and dist.is_initialized():
                # A collective that broke because another rank is gone: let that one speak first.
                time.sleep(_AFTER_THE_CAUSE_SECONDS)
            rank, first = self.board.post(text)
            if rank != self.board.rank:
                text = f"rank {self.board.rank} stopped because rank {rank} failed: {first}"
                time.sleep(_AFTER_THE_CAUSE_SECONDS)
                self._leave(text)
                return
        elif os.environ.get("RANK", "0") != "0":
            self._leave(text)  # before ranks know each other, all find the same mistake
            return
        with suppress(OSError, ValueError):  # torchrun may still hear of it
            print(f"error: {text}", file=sys.stderr, flush=True)
        self._leave(text)

    def _leave(self, text: str) -> None:
        path = self._get_error_file_path()
        if path:
            # torchrun prints the "callstack"; other layouts make it complain.
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            content = {"message": {"message": text, "extraInfo": extra}}
            self._write_error_file(path, json.dumps(content))


def exit_now(status: int = 1) -> NoReturn:
    """Leave without Python's own shutdown, which would wait for process groups whose other ranks
    are stuck in a collective.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a log on a full disk, or whose reader has gone
            stream.flush()
    os._exit(status)


@dataclass(frozen=True)
class Patience:
    """How long a watchdog waits; 0 is for ever."""

    hang_seconds: float
    """Without a step border."""
    sigterm_seconds: float
    """From SIGTERM to a step border."""


class Watchdog:
    """A thread that ends this process when it hangs, when another rank has failed, and when it
    cannot follow a SIGTERM.

    `beat` is called at every step border. A main thread that is stuck in a collective cannot help
    itself; a thread can.
    """

    def __init__(
        self,
        patience: Patience,
        handler: SentenceHandler,
        stop: StopRequest,
        groups: Groups,
        leave: Callable[[int], object] = exit_now,
        waiting: Waiting | None = None,
    ) -> None:
        """`groups` names what collectives run over; `leave` ends the process with a status;
        `waiting` knows what a pipeline stage waits for.
        """
        self._patience, self._handler, self._stop = patience, handler, stop
        self._groups, self._leave, self._waiting = groups, leave, waiting or Waiting()
        self._last, self._step, self._phase = time.monotonic(), 0, "start"
        self._answered: set[str] = set()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._last = time.monotonic()
        self._done.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """This rank is alive, and now in `phase` of `step`."""
        self._last, self._step, self._phase = time.monotonic(), step, phase

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        limits = [x for x in (self._patience.hang_seconds, self._patience.sigterm_seconds) if x]
        while not self._done.wait(min([_LOOK_EVERY_SECONDS, *(limit / 4 for limit in limits)])):
            status = self._look_at_signals() or self._look_at_time() or self._look_at_board()
            if status and not self._done.is_set():
                self._leave(status)
                return

    def _look_at_signals(self) -> int:
        """A status to leave with, or 0."""
        since = self._stop.seconds_since_sigterm()
        # A save that has begun may well end in time; torchrun's SIGKILL decides.
        if since is None or self._phase.startswith(SAVING):
            return 0
        where = ""
        if self._patience.sigterm_seconds and since >= self._patience.sigterm_seconds:
            where = f"being in {self._phase} of step {self._step}"
        # torchrun sends SIGTERM to those who outlive another, and not every collective notices a
        # death: gloo at times waits for ever to send to a peer that is gone.
        missing = self._missing_after_sigterm(since)
        if missing:
            where = f"since rank {', '.join(map(str, missing))} does not answer"
        if not where:
            return 0
        self._handler.record_exception(
            TrainingError(
                f"rank {self._rank} could not save within {since:.0f} s of SIGTERM, {where}: the "
                "newest checkpoint stands; if steps take that long, raise "
                "--train.sigterm-grace-seconds and torchrun's --shutdown-timeout"
            )
        )
        return 128 + signal.SIGTERM

    def _missing_after_sigterm(self, since: float) -> list[int]:
        board = self._handler.board
        if board is None or board.size == 1:
            return []
        try:
            board.call_for_states(_SIGTERM)
            if since < _ANSWER_AFTER_SIGTERM_SECONDS:
                return []
            return [rank for rank, state in board.states(_SIGTERM).items() if state is None]
        except (dist.DistError, RuntimeError):
            return []  # the store is gone: see the time

    def _look_at_time(self) -> int:
        limit, silent = self._patience.hang_seconds, time.monotonic() - self._last
        if not limit or silent <= limit:
            return 0
        try:
            where = self._ask_all(second=silent > limit + 4 * _ANSWER_OF_A_RANK_SECONDS)
        except (dist.DistError, RuntimeError):  # the store is gone
            where = diagnose({self._rank: self._state()})
        if where is None:
            return 0
        self._handler.record_exception(
            TrainingError(
                f"no step was finished for {silent:.0f} s: {where}; if a step only needs longer, "
                "raise --train.hang-timeout-seconds"
            )
        )
        return 1

    def _ask_all(self, *, second: bool) -> str | None:
        """Who holds up the run; None where another rank has asked, which will tell, unless it has
        not and this is the `second` try.
        """
        board = self._handler.board
        if board is None or board.size == 1:
            return diagnose({self._rank: self._state()})
        if board.call_for_states(_HANG) != board.rank and not second:
            return None
        board.post_state(_HANG, self._state())
        time.sleep(_ANSWER_OF_A_RANK_SECONDS)
        return diagnose(board.states(_HANG))

    def _look_at_board(self) -> int:
        board = self._handler.board
        if board is None:
            return 0
        try:
            for cause in {_HANG, _SIGTERM} - self._answered:
                if board.states_are_called_for(cause):
                    board.post_state(cause, self._state())
                    self._answered.add(cause)
            failure = board.read()
        except (dist.DistError, RuntimeError):
            return 0  # the store is gone: collectives will fail by themselves
        if failure is None or failure[0] == board.rank:
            return 0
        time.sleep(_AFTER_THE_CAUSE_SECONDS)
        return 1 if self._stop.seconds_since_sigterm() is None else 128 + signal.SIGTERM

    def _state(self) -> RankState:
        try:
            return rank_state(self._step, self._phase, self._groups, self._waiting.now)
        except Exception:  # an aid of torch's: without its word the run must still be ended
            return RankState(self._step, self._phase)

    @property
    def _rank(self) -> int:
        return 0 if self._handler.board is None else self._handler.board.rank
