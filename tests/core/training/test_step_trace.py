import io
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.config.parallel import ParallelConfig
from core.config.run import RunConfig
from core.parallel.context import ParallelContext
from core.pipeline.__main__ import main
from core.pipeline.schedules import Kind, make_schedule
from core.pipeline.trace import first_deviation, measured_work, read_trace
from core.testing.distributed import WorkerPool
from core.testing.tiny_task import TinyConfig, TinyTask, tiny_run
from core.training.step_trace import TRACE_FILE
from core.training.trainer import Trainer

SECONDS = 0.01


def _train_rank(config: RunConfig[TinyConfig]) -> str:
    """What a rank says."""
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    with redirect_stdout(io.StringIO()) as said:
        assert Trainer(TinyTask(seconds=SECONDS), config, ctx).fit()
    return said.getvalue()


@pytest.mark.parametrize("name", ["1f1b", "zbv"])
def test_a_run_leaves_a_step_that_can_be_drawn(
    tmp_path: Path, pool: WorkerPool, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    layout = {"1f1b": "E|L", "zbv": "E|||L"}[name]
    parallel = ParallelConfig(pp=2, schedule=name, layout=layout)  # type: ignore[arg-type]
    config = replace(tiny_run(save=tmp_path, trace_step=2, steps=3), parallel=parallel)
    said, _ = pool.run(_train_rank, 2, config)
    trainable = [True, False, False, True] if name == "zbv" else None
    schedule = make_schedule(name, stages=2, microbatches=8, trainable=trainable)
    timeline = read_trace(tmp_path / TRACE_FILE, schedule)
    assert first_deviation(timeline, schedule) is None
    # Every forward pass sleeps that long.
    assert all(work.forward >= 1e3 * SECONDS for work in measured_work(timeline, schedule))
    sent = {entry.action.microbatch: entry.end for entry in timeline[0] if _first(entry.action)}
    for action, start, _ in timeline[1]:
        if _first(action):
            assert start > sent[action.microbatch] - 5.0  # clocks are nearly the same
    # The command that the run prints fits the run, also where pieces are empty.
    command = shlex.split(said.partition("python -m core.pipeline ")[2].splitlines()[0])
    main(command[: command.index("--out")])
    out = capsys.readouterr().out
    assert f"{name}, measured in ms" in out
    assert "in the schedule's order" in out
    assert "of slowest" not in out  # what each part takes was not measured


def _first(action: object) -> bool:
    return action[:2] == (Kind.FORWARD, 0)  # type: ignore[index]


def test_one_process_is_traced_too(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, trace_step=2)
    assert Trainer(TinyTask(), config, ParallelContext.single()).fit()
    schedule = make_schedule("1f1b", stages=1, microbatches=8)
    (entries,) = read_trace(tmp_path / TRACE_FILE, schedule)
    assert len(entries) == 16
