"""Runs over pipeline stages as a person starts them: what they say, leave and begin with."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from converters.source import open_source
from core.config.data import DataConfig
from core.config.parallel import ParallelConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.parallel.context import ParallelContext
from core.pipeline.__main__ import main
from core.testing.distributed import WorkerPool
from core.testing.hf_models import save_hf_model
from core.testing.parity import gather_whole
from core.training.staged_model import StagedModel
from core.training.step_trace import TRACE_FILE
from models.llama.convert import FAMILY
from models.llama.train import llama_task

ROOT = Path(__file__).parents[2]


def test_a_run_says_its_layout_and_leaves_a_step_to_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--device cpu --precision.dtype fp32 --data.synthetic --data.num-workers 0 "
    options += "--preset tiny --model.num-layers 5 --data.seq-length 16 --train.steps 3 "
    options += "--parallel.pp 2 --parallel.schedule zb_h1 --train.global-batch-size 4 "
    options += (
        f"--train.eval-interval 3 --train.eval-steps 1 --train.trace-step 2 --save {tmp_path}"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(ROOT / "models/llama/train.py"), *options.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "schedule zb_h1, layout E t*" in said
    assert "stage  parts" in said
    assert "is the slowest: it alone lets all stages together be busy" in said
    assert "validation" in said
    line = next(line for line in said.splitlines() if "draw it with" in line)
    command = shlex.split(line.partition("python -m core.pipeline ")[2])
    assert command[-2:] == ["--out", "step.png"]
    command[-1] = str(tmp_path / "step.png")
    main(command)
    out = capsys.readouterr().out
    assert "measured: bubble" in out
    assert "in the schedule's order" in out
    assert Path(command[-1]).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / TRACE_FILE).stat().st_size > 1000


def _imported(folder: Path, parallel: ParallelConfig) -> tuple[list[str], dict[str, Tensor]]:
    """What this rank holds of the imported model, and all of it."""
    source = open_source(folder, FAMILY)
    config = RunConfig(
        model=source.config,
        parallel=parallel,
        data=DataConfig(synthetic=True, seq_length=16),
        train=TrainConfig(steps=1),
    )
    ctx = ParallelContext.create(parallel, torch.device("cpu"))
    task = llama_task(config)
    parameters = StagedModel(task, config, ctx, torch.float32).data_parallel.parameters
    task.import_weights(folder, parameters)
    values = {name: declared.local for name, declared in parameters.items()}
    return list(values), gather_whole(parameters, ctx, values)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pp=2),
        ParallelConfig(pp=2, tp=2, layout="E|t*2 L"),
        ParallelConfig(pp=2, schedule="zbv"),
        ParallelConfig(pp=4, schedule="zb_h1"),
    ],
    ids=["1f1b", "uneven, tp", "zbv", "zb_h1"],
)
@pytest.mark.parametrize("variant", ["llama", pytest.param("llama3", marks=pytest.mark.full)])
def test_weights_go_straight_into_stages(
    tmp_path: Path, pool: WorkerPool, variant: str, parallel: ParallelConfig
) -> None:
    """Untied and tied, each stage reads what it holds and nothing else is there."""
    folder = save_hf_model(tmp_path / "hf", variant, num_hidden_layers=2)
    names, expected = _imported(folder, replace(parallel, pp=1, tp=1, layout=None, schedule="1f1b"))
    ranks = pool.run(_imported, parallel.pp * parallel.tp, folder, parallel)
    assert {name for held, _ in ranks for name in held} == set(names)
    # Under a tied table a stage that has all layers and the head has every name.
    assert min(len(held) for held, _ in ranks) < len(names)
    for _, found in ranks:
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name
