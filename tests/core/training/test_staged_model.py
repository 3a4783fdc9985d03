"""A run over pipeline stages reports and saves what one process does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.reader import open_checkpoint
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.errors import ConfigError
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerPool
from core.testing.tiny_task import TinyConfig, TinyTask, tiny_run
from core.training.metrics import METRICS_FILE
from core.training.trainer import Trainer

TIMED = ("per_second", "tflops", "seconds", "gib")


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [{n: x for n, x in row.items() if not any(t in n for t in TIMED)} for row in rows]


def _train_rank(config: RunConfig[TinyConfig]) -> list[str]:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(TinyTask(second_loss=True), config, ctx)
    assert trainer.fit()
    assert all(chunk.training for chunk in trainer.model.chunks)
    return list(trainer.state.parameters)


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    config = tiny_run(save=folder)
    trainer = Trainer(TinyTask(), config, ParallelContext.single())
    assert open_checkpoint(folder).path.name == "step_00000006"
    return {name: p.local.clone() for name, p in trainer.state.parameters.items()}


@pytest.mark.parametrize(
    ("parallel", "held"),
    [
        (ParallelConfig(pp=2), [["embedding"], ["head"]]),
        (ParallelConfig(pp=2, schedule="gpipe", dp=2), [["embedding"]] * 2 + [["head"]] * 2),
        # The first stage has the loss, the second only passes data on.
        (ParallelConfig(pp=2, schedule="zbv", layout="E|||L"), [["embedding", "head"], []]),
        (ParallelConfig(pp=2, schedule="interleaved", layout="E|||L"), [["embedding"], ["head"]]),
    ],
    ids=["1f1b", "gpipe", "zbv", "interleaved"],
)
def test_stages_report_what_one_process_does(
    tmp_path: Path, pool: WorkerPool, parallel: ParallelConfig, held: list[list[str]]
) -> None:
    options: dict[str, Any] = {"eval_interval": 3, "eval_steps": 2, "save_interval": 2}
    single = tiny_run(save=tmp_path / "a", **options)
    Trainer(TinyTask(second_loss=True), single, ParallelContext.single()).fit()
    several = replace(tiny_run(save=tmp_path / "b", **options), parallel=parallel)
    assert pool.run(_train_rank, len(held), several) == held
    expected, found = _rows(tmp_path / "a"), _rows(tmp_path / "b")
    assert "logit_max" in expected[0]
    assert any("validation_square" in row for row in expected)
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        if parallel.dp:  # a mean over other microbatches
            a.pop("logit_max", None)
            b.pop("logit_max", None)
        assert b == pytest.approx(a, rel=1e-12)
    one, other = _saved(tmp_path / "a"), _saved(tmp_path / "b")
    assert set(one) == {"embedding", "head"} == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)


def _train_half(config: RunConfig[TinyConfig]) -> None:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    assert Trainer(TinyTask(infinite_at=(1, 3)), config, ctx).fit()


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_all_stages_scale_the_loss_and_skip_alike(
    tmp_path: Path, pool: WorkerPool, schedule: Any
) -> None:
    """In fp16, with a loss that is infinite on the last stage in two steps of six."""
    precision = PrecisionConfig(dtype="fp16", initial_loss_scale=1024.0, loss_scale_hysteresis=1)
    single = replace(tiny_run(save=tmp_path / "a"), precision=precision)
    Trainer(TinyTask(infinite_at=(1, 3)), single, ParallelContext.single()).fit()
    parallel = ParallelConfig(pp=2, schedule=schedule)
    pool.run(_train_half, 2, replace(single, save=str(tmp_path / "b"), parallel=parallel))
    expected, found = _rows(tmp_path / "a"), _rows(tmp_path / "b")
    assert [row["loss_scale"] for row in expected] == [1024, 1024, 512, 512, 256, 256]
    assert expected[-1]["skipped_steps"] == 2
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():  # null where a number is not finite
            assert b[name] == (value if value is None else pytest.approx(value, rel=1e-3)), name


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    config = replace(tiny_run(), parallel=ParallelConfig(pp=4))
    with pytest.raises(ConfigError, match=r"--parallel.pp 4: 4 stages of 1 chunks hold 4 pieces"):
        Trainer(TinyTask(), config, ParallelContext.single())
