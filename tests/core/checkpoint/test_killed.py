"""Processes that are killed while they save leave the checkpoint before."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core.checkpoint.index import SavedTensor
from core.checkpoint.reader import open_checkpoint
from core.parallel.sharding import whole_copy

ROWS, COLUMNS, WORLD = 512, 1024, 2

PROGRAM = f"""
import sys
from pathlib import Path
import torch, torch.distributed as dist
from core.checkpoint.index import SavedTensor
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.saver import CheckpointSaver
from core.config.parallel import ParallelConfig
from core.parallel.context import ParallelContext
from core.parallel.sharding import Box, BoxCopy, whole_copy

root, store, rank, mode = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{{store}}", rank=rank, world_size={WORLD})
ctx = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
half = ({ROWS} // {WORLD}, {COLUMNS})
moment, weight = torch.zeros(half), torch.zeros({ROWS}, {COLUMNS})
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
print("ready", flush=True)
while True:
    step += 1
    moment.fill_(step)
    weight.fill_(step)
    saver.save(step, {{}})
    saver.wait()
    print(step, flush=True)
"""


def start(root: Path, store: Path, mode: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(root), str(store), str(rank), mode],
            stdout=subprocess.PIPE,
            stderr=store.with_suffix(f".{rank}").open("w"),
            text=True,
        )
        for rank in range(WORLD)
    ]


@pytest.mark.parametrize(
    "mode", ["asynchronous", pytest.param("synchronous", marks=pytest.mark.full)]
)
def test_a_kill_at_any_instant_leaves_the_checkpoint_before(tmp_path: Path, mode: str) -> None:
    rng, root, reached = random.Random(0), tmp_path / "run", 0
    for attempt in range(4):
        processes = start(root, tmp_path / f"store{attempt}", mode)
        try:
            assert processes[0].stdout is not None
            ready = processes[0].stdout.readline()
            assert ready == "ready\n", (tmp_path / f"store{attempt}.0").read_text()
            time.sleep(rng.uniform(0.02, 0.4))
        finally:
            for process in rng.sample(processes, WORLD):
                os.kill(process.pid, signal.SIGKILL)
                time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.05)]))
            said = [process.communicate()[0].split() for process in processes]
        finished = max(
            [reached, *(int(word) for words in said for word in words if word != "ready")]
        )
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
