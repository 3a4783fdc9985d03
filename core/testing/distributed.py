"""A warm pool of gloo worker processes: importing torch takes seconds, so tests start workers once
and reuse them, and where workers can be forked it is imported once for all of them.
"""

import gc
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import (  # type: ignore[attr-defined]  # public, yet not re-exported
    PrefixStore,
    TCPStore,
)

from core.testing.packed import packed

IMPORTED_ONCE = ["torch._dynamo", "torch.distributed.fsdp", "core.training.trainer", "pytest"]
"""What takes workers long to import, and starts no threads and nothing on a device."""


def worker_context() -> SpawnContext | ForkServerContext:
    """How processes for tests are started.

    They are forked from a process that has done nothing but import `IMPORTED_ONCE`. On a machine
    with GPUs they are spawned: CUDA cannot be used after a fork from a process that has touched it,
    as an import may.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


class WorkerError(RuntimeError):
    """A function failed in a worker; the message is the first failing rank's traceback."""


class WorkerPool:
    """Runs top-level functions on `world_size` processes that form one gloo process group.

    Workers are started when first needed and kept until `close`. A failure or time-out ends them
    all, so that a hung collective cannot spoil the next call, and the next call starts new ones.
    """

    def __init__(self) -> None:
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._runs = 0

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout: float = 240.0,
        device: str = "cpu",
    ) -> list[Any]:
        """Call `fn(*args)` on every rank with torch.distributed initialised; return the results in
        rank order.

        Args:
            fn: a picklable top-level function.
            world_size: number of processes.
            *args: picklable arguments, the same on all ranks.
            timeout: seconds after which the call is given up.
            device: `cpu` (gloo) or `cuda` (nccl, one GPU a rank).

        Raises:
            WorkerError: a rank raised, died or did not answer in time.
        """
        while len(self._workers) < world_size:
            self._start()
        self._runs += 1
        task = (fn, args, world_size, f"run{self._runs}", self._store.port, timeout, device)
        message = pickle.dumps(task)
        for rank in range(world_size):
            try:
                self._workers[rank][1].send_bytes(message)
            except BrokenPipeError as error:
                self.close()
                raise WorkerError(
                    f"rank {rank} of {world_size}: the process died before the call"
                ) from error
        return self._collect(world_size, timeout)

    def _start(self) -> None:
        context = worker_context()
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(len(self._workers), theirs), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def _collect(self, world_size: int, timeout: float) -> list[Any]:
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        results: list[Any] = [None] * world_size
        failures: list[tuple[float, int, str]] = []
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    failed_at, results[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    failed_at, results[rank] = time.time(), "the process died"
                if failed_at is not None:
                    failures.append((failed_at, rank, results[rank]))
                    # The others fail in their collectives soon after; the first to fail is the
                    # cause.
                    deadline = min(deadline, time.monotonic() + 1.0)
        if failures:
            self.close()
            _, rank, what = min(failures)
            raise WorkerError(f"rank {rank} of {world_size}: {what}")
        if waiting:
            self.close()
            raise WorkerError(f"ranks {sorted(waiting.values())} gave no answer in {timeout} s")
        return results

    def close(self) -> None:
        """End all workers."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers.clear()


def _serve(rank: int, connection: Connection) -> None:
    """A worker: answer tasks until the pipe closes."""
    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        answer: tuple[float | None, Any]
        try:
            answer = _run_task(rank, message)
        except BaseException:
            answer = (time.time(), traceback.format_exc())
        connection.send_bytes(packed(answer))
        sys.stdout.flush()
        # Cycles keep process groups alive, each with threads that wake a hundred times a second:
        # with a few hundred groups left over, the machine does little else.
        del answer
        gc.collect()


def _run_task(rank: int, message: bytes) -> tuple[float | None, Any]:
    """The result, or when and how the function failed: seen before the group goes, which makes the
    other ranks fail too.
    """
    fn, args, world_size, name, port, timeout, device = pickle.loads(message)
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        return None, fn(*args)
    except BaseException:
        return time.time(), traceback.format_exc()
    finally:
        dist.destroy_process_group()
