import ctypes
import gc
import os
import signal
import threading
import time

import pytest

from core.training.interrupts import StopRequest


def test_stop_requests_take_over_signals_and_give_them_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert stop.reason is None
        signal.raise_signal(signal.SIGINT)
        assert stop.reason == "SIGINT"
        signal.raise_signal(signal.SIGINT)  # the same key press, passed on by torchrun
        stop._signalled_at -= 10.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_time_limit_is_a_reason() -> None:
    assert StopRequest(60.0).reason is None
    assert StopRequest(0.0).reason == "the time limit of 0.0 minutes"


def test_sigterm_is_seen_while_the_main_thread_is_busy() -> None:
    """Python's handler waits for the main thread; another thread sees the signal all the same."""
    gc.collect()  # what earlier tests left open must not be closed between the two counts
    files, seen = len(os.listdir("/proc/self/fd")), []
    with StopRequest() as stop:
        assert stop.seconds_since_sigterm() is None

        def terminate() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            time.sleep(0.1)  # the main thread is in usleep from here on
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            seen.append((stop.seconds_since_sigterm(), stop.reason))
            time.sleep(0.05)
            seen.append((stop.seconds_since_sigterm(), stop.reason))

        thread = threading.Thread(target=terminate)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            thread.start()
            # As in a collective: C code that no signal wakes.
            ctypes.CDLL(None).usleep(400_000)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        thread.join()
        assert stop.reason == "SIGTERM"
    (first, reason), (second, _) = seen
    assert reason is None
    assert first is not None
    assert second is not None
    assert 0.04 < second - first < 5.0
    assert len(os.listdir("/proc/self/fd")) == files
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_is_no_sigterm() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.seconds_since_sigterm() is None
