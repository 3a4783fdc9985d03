"""Reasons to end a run early and well: SIGTERM, Ctrl-C, a time limit."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# torchrun passes Ctrl-C on to workers that the terminal has sent it to already: the second within
# this many seconds is the same key press.
_SAME_KEY_PRESS_SECONDS = 3.0


class StopRequest:
    """Remembers that this process was asked to stop; the trainer polls it at step borders.

    As a context manager it takes over SIGTERM and SIGINT, and gives them back. A later second
    Ctrl-C raises KeyboardInterrupt.

    Python runs its handlers in the main thread, and only between two instructions of its own: not
    while that thread waits in a collective. The C side of a handler runs at once and writes to a
    pipe, which another thread can read.
    """

    def __init__(self, minutes: float | None = None) -> None:
        """Start the clock of a run that may take this many minutes."""
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._limit = f"the time limit of {minutes} minutes"
        self._signal: signal.Signals | None = None
        self._signalled_at = 0.0
        self._previous: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_pipe = -1
        self._terminated_at: float | None = None

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return self._limit
        return None

    def seconds_since_sigterm(self) -> float | None:
        """How long ago SIGTERM came, as seen by calls of this method, or None. For one thread, of
        any kind, as long as the signals are taken over.
        """
        if self._terminated_at is None and self._pipe is not None:
            try:
                seen = os.read(self._pipe[0], 4096)
            except BlockingIOError:
                seen = b""
            if signal.SIGTERM in seen:
                self._terminated_at = time.monotonic()
        return None if self._terminated_at is None else time.monotonic() - self._terminated_at

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        again = self._signal is not None and now - self._signalled_at > _SAME_KEY_PRESS_SECONDS
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal, self._signalled_at = signal.Signals(number), now

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread only; elsewhere the time limit still works.
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            for end in self._pipe:
                os.close(end)
            self._pipe = None
