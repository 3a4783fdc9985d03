"""Steps timed so that two contestants see the same clocks: short blocks in turns, A B B A A B."""

import gc
import itertools
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from benchmarks.contestants.registry import Contestant
from benchmarks.records import Timed


def block(contestant: Contestant, steps: int, device: torch.device) -> tuple[list[float], str]:
    """Run steps without a wait between them.

    Returns:
        Seconds of each, by the device's clock where it has one; clock and power near the end.
    """
    if device.type != "cuda":
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            contestant.step()
            seconds.append(time.perf_counter() - start)
        return seconds, ""
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        contestant.step()
        mark.record()
    state = _gpu_state()  # most of the last step is still to run
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)], state


def in_turns(
    contestants: Sequence[Contestant],
    records: Sequence[Timed],
    *,
    rounds: int,
    steps: int,
    device: torch.device,
) -> None:
    """Time `rounds` blocks of every contestant into its record, in rotated order."""
    both = list(zip(contestants, records, strict=True))
    with short_collections():
        for number in range(rounds):
            for contestant, record in both if number % 2 == 0 else reversed(both):
                seconds, state = block(contestant, steps, device)
                record.blocks.append(seconds)
                record.clocks.append(state)


@contextmanager
def short_collections() -> Iterator[None]:
    """Python's garbage collector looks only at objects made inside: it stays on, as a contestant's
    steps may leave cycles that hold memory of the device, but is never long.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _gpu_state() -> str:
    """SM clock and power of the GPU, as its tool prints them; empty without the tool."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = "--query-gpu=clocks.sm,power.draw"
    command = ["nvidia-smi", query, "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
