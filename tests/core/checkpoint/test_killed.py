"""Processes that are killed while they save leave the checkpoint before."""

import random
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from core.checkpoint.index import SavedTensor
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.saver import CheckpointSaver
from core.config.parallel import ParallelConfig
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.sharding import Box, BoxCopy
from core.testing.distributed import worker_context

ROWS, COLUMNS, WORLD = 512, 1024, 2


def save_on_and_on(root: Path, store: Path, rank: int, mode: str, said: Connection) -> None:
    """Say the last step saved; then save further ones until killed, and say each as it is saved."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    ctx = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    half = (ROWS // WORLD, COLUMNS)
    moment, weight = torch.zeros(half), torch.zeros(ROWS, COLUMNS)
    copies = (BoxCopy(Box((0, 0), half), Box((rank * half[0], 0), half)),)
    tensors = [
        SavedTensor("m", weight.shape, copies, moment),
        SavedTensor("w", weight.shape, whole_copy(weight.shape), weight),
    ]
    step = 0
    if list(root.glob("step_*")):
        reader = open_checkpoint(root)
        reader.load(tensors)
        step = reader.step
    saver = CheckpointSaver(root, tensors, ctx, keep_last=2, asynchronous=mode == "asynchronous")
    saver.prepare()
    dist.barrier()
    said.send(step)
    while True:
        step += 1
        moment.fill_(step)
        weight.fill_(step)
        saver.save(step, {})
        saver.wait()
        said.send(step)


def start(root: Path, store: Path, mode: str) -> list[tuple[BaseProcess, Connection]]:
    context = worker_context()
    found: list[tuple[BaseProcess, Connection]] = []
    for rank in range(WORLD):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (root, store, rank, mode, theirs)
        process = context.Process(target=save_on_and_on, args=arguments, daemon=True)
        process.start()
        theirs.close()
        found.append((process, ours))
    return found


def all_said(process: BaseProcess, said: Connection) -> list[int]:
    """The steps of a process that ends."""
    process.join()
    steps: list[int] = []
    with suppress(EOFError):
        while True:
            steps.append(said.recv())
    return steps


@pytest.mark.parametrize(
    "mode", ["asynchronous", pytest.param("synchronous", marks=pytest.mark.full)]
)
def test_a_kill_at_any_instant_leaves_the_checkpoint_before(tmp_path: Path, mode: str) -> None:
    rng, root, reached = random.Random(0), tmp_path / "run", 0
    for attempt in range(4):
        processes = start(root, tmp_path / f"store{attempt}", mode)
        try:
            assert processes[0][1].recv() == reached
            time.sleep(rng.uniform(0.02, 0.4))
        finally:
            for process, _ in rng.sample(processes, WORLD):
                process.kill()
                time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.05)]))
            saved = [step for process, said in processes for step in all_said(process, said)]
        finished = max([reached, *saved])
        if not list(root.glob("step_*")):
            assert finished == 0
            continue
        reader = open_checkpoint(root)
        reader.verify()
        assert finished <= reader.step <= finished + 1
        for name in ("m", "w"):
            out = torch.empty(ROWS, COLUMNS)
            reader.load([SavedTensor(name, out.shape, whole_copy(out.shape), out)])
            assert out.unique().tolist() == [reader.step]
        reached = reader.step
    assert reached > 0
    # The last attempt has removed what all before left; one directory may be its own.
    assert len(list(root.glob(".step_*"))) <= 3
