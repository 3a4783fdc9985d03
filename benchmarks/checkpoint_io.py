"""Speed of saving and loading a checkpoint, beside what the disk does.

`python benchmarks/checkpoint_io.py FOLDER` starts processes that hold a state together, most of it
cut like a sharded optimizer and a part replicated like parameters, and prints a table. Files are
flushed when they count as written, and dropped from the page cache before they are read. Of two
checkpoints saved one after the other, dd reads one and a load the other, in turns: some disks keep
what was read last in memory of their own, and some read zeros faster than numbers.
"""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from core.checkpoint.directory import step_name
from core.checkpoint.index import SavedTensor
from core.checkpoint.reader import CheckpointReader
from core.checkpoint.saver import CheckpointSaver
from core.config.loading import exit_on_user_error
from core.config.parallel import ParallelConfig
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.sharding import Box, BoxCopy
from core.testing.distributed import WorkerPool

COLUMNS = 1024


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder on the disk in question; what is written there is removed again."""
    gib: float = 10.0
    """Size of the checkpoint."""
    processes: int = 4
    """Processes that share it."""
    tensors: int = 40
    """Tensors that it consists of."""
    asynchronous: bool = False
    """Save in the background, from a copy in memory: needs that much memory more."""
    repeats: int = 4
    """Rounds of two saves, a load and a read by dd."""

    @property
    def size(self) -> int:
        """Bytes."""
        return int(self.gib * 2**30)


def state(work: Work, rank: int) -> list[SavedTensor]:
    """A rank's tensors: rows of fp32 ones, and every sixth a whole bf16 one."""
    rows = int(work.gib * 2**30 / work.tensors / COLUMNS / 4) // work.processes
    found = []
    for number in range(work.tensors):
        if number % 6 == 5:
            shape = (rows * work.processes * 2, COLUMNS)
            whole = torch.zeros(shape, dtype=torch.bfloat16)
            found.append(SavedTensor(f"model/{number}", shape, whole_copy(shape), whole))
            continue
        own = Box((0, 0), (rows, COLUMNS))
        copies = (BoxCopy(own, Box((rank * rows, 0), own.shape)),)
        shape = (rows * work.processes, COLUMNS)
        found.append(SavedTensor(f"optim/{number}", shape, copies, torch.zeros(own.shape)))
    return found


def timed(action: Callable[[], object]) -> float:
    """Seconds until the last rank is through."""
    dist.barrier()
    begin = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - begin


def drop_cache(folder: Path) -> None:
    """Have the files of a folder read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(work: Work, folder: Path) -> dict[str, list[float]]:
    """Runs in every process; returns the seconds of all repeats by name. A shared disk changes its
    mind from minute to minute: so what is compared takes turns.
    """
    ctx = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    tensors = state(work, ctx.world.rank)
    for number, saved in enumerate(tensors):
        torch.manual_seed(number)
        saved.tensor.view(torch.int32).random_()
    expected = [saved.tensor[-1].view(torch.int32).clone() for saved in tensors]
    run = folder / "run"
    saver = CheckpointSaver(run, tensors, ctx, keep_last=2, asynchronous=work.asynchronous)
    saver.prepare()
    seconds: dict[str, list[float]] = {}

    def take(name: str, action: Callable[[], object]) -> None:
        seconds.setdefault(name, []).append(timed(action))

    def on_first_rank(action: Callable[[], object]) -> Callable[[], object]:
        return action if ctx.world.rank == 0 else lambda: None

    def save(step: int) -> None:
        begin = time.perf_counter()
        if work.asynchronous:
            take("copy", partial(saver.save, step, {}))
        else:
            saver.save(step, {})
        saver.wait()
        seconds.setdefault("save", []).append(time.perf_counter() - begin)

    def load(step: int) -> None:
        for saved in tensors:
            saved.tensor.zero_()
        on_first_rank(lambda: drop_cache(run))()
        reader = CheckpointReader(run / step_name(step))
        take("load", partial(reader.load, tensors))
        for saved, row in zip(tensors, expected, strict=True):
            if not torch.equal(saved.tensor[-1].view(torch.int32), row):
                raise ValueError(f"{saved.name} came back changed")

    def read(step: int) -> None:
        on_first_rank(lambda: drop_cache(run))()
        take("dd read", on_first_rank(lambda: read_by_dd(run / step_name(step))))

    for number in range(work.repeats):
        take("dd write", on_first_rank(lambda: write_by_dd(folder / "dd", work.size)))
        on_first_rank(lambda: (folder / "dd").unlink())()
        first, second = 2 * number + 1, 2 * number + 2
        save(first)
        save(second)
        for action in (load, read) if number % 2 else (read, load):
            action(first if action is load else second)
    saver.close()
    return seconds


def write_by_dd(file: Path, size: int) -> None:
    """Write zeros."""
    what = ["if=/dev/zero", f"of={file}", f"count={size >> 24}", "conv=fsync"]
    subprocess.run(["dd", "bs=16M", *what], check=True, capture_output=True)


def read_by_dd(folder: Path) -> None:
    """Read the files of a checkpoint, one after another."""
    for file in sorted(folder.glob("*.safetensors")):
        what = [f"if={file}", "of=/dev/null"]
        subprocess.run(["dd", "bs=16M", *what], check=True, capture_output=True)


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A new folder that is removed in the end."""
    path = folder / f".checkpoint_io.{os.getpid()}"
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@exit_on_user_error()
def main() -> None:
    work = tyro.cli(Work)
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores", end=", ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    mode = "asynchronous" if work.asynchronous else "synchronous"
    print(f"{work.gib} GiB, {work.tensors} tensors, {work.processes} processes, {mode} saves")
    with scratch(work.folder) as folder:
        pool = WorkerPool()
        try:
            ranks = pool.run(measure, work.processes, work, folder, timeout=3000.0)
        finally:
            pool.close()
    seconds = {
        name: [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)]
        for name in ranks[0]
    }
    print(f"{'GB/s':10}{'median':>8}{'best':>8}   of dd (medians)   all")
    for name, times in seconds.items():
        rates = [work.size / took / 1e9 for took in times]
        base = {"save": "dd write", "load": "dd read"}.get(name)
        share = "" if base is None else f"{median(seconds[base]) / median(times):.0%}"
        every = " ".join(f"{rate:.2f}" for rate in rates)
        print(f"{name:10}{median(rates):8.2f}{max(rates):8.2f}{share:>18}   {every}")


if __name__ == "__main__":
    main()
