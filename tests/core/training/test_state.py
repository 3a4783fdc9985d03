"""What a run starts from when files are damaged, and how it saves."""

import errno
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint.directory import step_name
from core.checkpoint.index import saved_parameters
from core.checkpoint.reader import CheckpointReader, open_checkpoint
from core.checkpoint.saver import save_checkpoint
from core.config.parallel import ParallelConfig
from core.config.run import RunConfig
from core.errors import CheckpointError, DamagedCheckpointError
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerError, WorkerPool
from core.testing.tiny_task import TinyConfig, TinyTask, tiny_run
from core.training.metrics import METRICS_FILE
from core.training.state import Position
from core.training.trainer import Trainer

RANK_FILE = "rank_00000.safetensors"
Run = tuple[RunConfig[TinyConfig], Path]


def start(config: RunConfig[TinyConfig]) -> Trainer:
    return Trainer(TinyTask(), config, ParallelContext.single())


def everything(trainer: Trainer) -> dict[str, Tensor]:
    state = {
        f"{s.name}/{s.fragment.name}": s.tensor.clone() for s in trainer.optimizer.state_tensors()
    }
    return {
        **{n: p.detach().clone() for n, p in trainer.model.chunks[0].named_parameters()},
        **state,
    }


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with checkpoints of steps 2, 4 and 6, and a tokenizer."""
    folder = tmp_path_factory.mktemp("finished")
    hf = folder / "source"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    (hf / "tokenizer.json").write_text('{"a": 1}' * 20)
    config = tiny_run(save=folder / "run", save_interval=2, keep_last=0, init_from=hf)
    assert start(config).fit()
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    return tiny_run(save=folder, save_interval=2, keep_last=0), folder


Damage = Callable[[bytes], bytes | None]


def flips(size: int) -> Iterator[Damage]:
    rng = random.Random(size)
    for at in sorted({0, 1, size - 1, *rng.choices(range(size), k=25)}):
        mask = rng.randrange(1, 256)
        yield (
            lambda data, at=at, mask=mask: (  # type: ignore[misc]
                data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]
            )
        )


def truncations(size: int) -> Iterator[Damage]:
    for kept in (0, 1, size // 2, size - 1):
        yield lambda data, kept=kept: data[:kept]  # type: ignore[misc]
    yield lambda data: None


@pytest.mark.parametrize("name", [RANK_FILE, "index.json", "hf/tokenizer.json"])
@pytest.mark.parametrize("kind", [flips, truncations])
def test_a_damaged_file_is_named_and_the_checkpoint_before_loads(
    run: Run,
    name: str,
    kind: Callable[[int], Iterator[Damage]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, folder = run
    file = folder / "step_00000006" / name
    data = file.read_bytes()
    expected = start(replace(config, save=None, load=str(folder / "step_00000004")))
    for damage in kind(len(data)):
        changed = damage(data)
        file.unlink()
        if changed is not None:
            file.write_bytes(changed)
        caplog.clear()
        trainer = start(config)
        assert trainer.state.position.step == 4
        assert_equal(everything(trainer), everything(expected))
        assert trainer.optimizer.state_dict() == expected.optimizer.state_dict()
        (warning,) = (r for r in caplog.records if r.levelno == logging.WARNING)
        assert "passing over step_00000006" in warning.getMessage()
        assert str(file) in warning.getMessage()
        # A step directory that is named does not fall back.
        explicit = replace(config, save=None, load=str(folder / "step_00000006"))
        with pytest.raises(CheckpointError, match="index.json" if name == "index.json" else name):
            start(explicit)
        file.write_bytes(data)
    assert start(config).state.position.step == 6


@pytest.mark.parametrize("kind", [flips, truncations])
def test_a_damaged_latest_is_named(
    run: Run, kind: Callable[[int], Iterator[Damage]], caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = run
    file = folder / "latest"
    data = file.read_bytes()
    for damage in kind(len(data)):
        changed = damage(data)
        file.unlink()
        if changed is not None:
            file.write_bytes(changed)
        caplog.clear()
        assert start(config).state.position.step == 6  # the highest
        assert open_checkpoint(folder).step == 6
        for record in caplog.records:
            assert str(file) in record.getMessage()
        assert len(caplog.records) == 2
        file.write_bytes(data)


def flip_last_byte(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_several_damaged_checkpoints_and_then_none(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    config, folder = run
    for step, left in ((6, 4), (4, 2)):
        flip_last_byte(folder / f"step_0000000{step}" / RANK_FILE)
        for source in (config, replace(config, save=None, load=str(folder))):
            caplog.clear()
            assert start(source).state.position.step == left
            assert len(caplog.records) == (6 - left) // 2
    # It goes on from there, and replaces the damaged ones.
    assert start(config).fit()
    assert open_checkpoint(folder).step == 6
    open_checkpoint(folder).verify()
    for step in (2, 4, 6):
        flip_last_byte(folder / f"step_0000000{step}" / RANK_FILE)
    with pytest.raises(DamagedCheckpointError, match=rf"step_00000006/{RANK_FILE} is damaged"):
        start(config)


@pytest.mark.parametrize(
    ("interval", "kept"),
    [(0, [4, 6, 8]), (2, [6, 8])],  # in the second run step 6 is saved anew
)
def test_a_damaged_checkpoint_takes_no_place_of_those_that_are_kept(
    run: Run, interval: int, kept: list[int]
) -> None:
    config, folder = run
    file = folder / "step_00000006" / RANK_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    train = replace(config.train, steps=8, save_interval=interval, keep_last=2)
    assert start(replace(config, train=train)).fit()
    assert sorted(folder.glob("step_*")) == [folder / step_name(step) for step in kept]


def test_another_architecture_is_no_damage(run: Run) -> None:
    """An older checkpoint would be as wrong, and a way around the mistake."""
    config, _ = run
    other = replace(config, model=TinyConfig(hidden_size=4))
    with pytest.raises(CheckpointError, match=r"step_00000006 is of another architecture"):
        Trainer(TinyTask(model_config=other.model), other, ParallelContext.single())


def damage_after_loading(patch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Find a step damaged once all of it has been loaded; returns the steps of all loads."""
    load, steps = CheckpointReader.load, list[int]()

    def late(self: CheckpointReader, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        steps.append(self.step)
        if steps[-2:] == [step, step]:  # parameters, then optimizer
            raise DamagedCheckpointError(f"{self.path}/x is damaged")

    patch.setattr(CheckpointReader, "load", late)
    return steps


def test_weights_alone_replace_a_loaded_state(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = run
    whole = start(config)
    (folder / "step_00000006").rename(tmp_path / "step_00000006")
    shutil.rmtree(folder)
    save_checkpoint(
        folder,
        0,
        saved_parameters(whole.state.parameters),
        {"config": TinyConfig()},
        ParallelContext.single(),
    )
    expected = start(config)
    assert expected.state.position == Position()
    (tmp_path / "step_00000006").rename(folder / "step_00000006")
    (folder / "latest").unlink()
    steps = damage_after_loading(monkeypatch, 6)
    trainer = start(config)
    assert steps == [6, 6, 0]
    assert trainer.state.position == Position()
    assert trainer.optimizer.state_dict() == expected.optimizer.state_dict()
    assert_equal(everything(trainer), everything(expected))


def _start_with_damage_on_rank_1(config: RunConfig[TinyConfig]) -> tuple[int, dict[str, Tensor]]:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if ctx.world.rank == 1:
            damage_after_loading(patch, 6)
        trainer = Trainer(TinyTask(), config, ctx)
    return trainer.state.position.step, everything(trainer)


def test_all_ranks_pass_over_what_one_finds_damaged(run: Run, pool: WorkerPool) -> None:
    config, folder = run
    expected = start(replace(config, save=None, load=str(folder / "step_00000004")))
    config = replace(config, parallel=ParallelConfig(dp=2, data_parallel="replicated"))
    for step, found in pool.run(_start_with_damage_on_rank_1, 2, config):
        assert step == 4
        assert_equal(found, everything(expected))
    explicit = replace(config, save=None, load=str(folder / "step_00000006"))
    with pytest.raises(WorkerError, match="step_00000006/x is damaged"):
        pool.run(_start_with_damage_on_rank_1, 2, explicit)


# ---- Saving on the way ---------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [True, False])
def test_both_ways_of_saving_resume_alike(tmp_path: Path, async_save: bool) -> None:
    whole = start(tiny_run(save=tmp_path / "whole", steps=10, save_interval=1))
    assert whole.fit()
    config = tiny_run(save=tmp_path / "run", steps=10, save_interval=1, async_save=async_save)
    failing = Trainer(TinyTask(fail_at=(0, 7)), config, ParallelContext.single())
    with pytest.raises(RuntimeError, match="made to fail"):
        failing.fit()
    # What was being written when it failed was written to its end.
    again = start(config)
    assert again.state.position.step == 7
    assert again.fit()
    assert_equal(everything(again), everything(whole))
    names = sorted(path.name for path in (tmp_path / "run").glob("*step_*"))
    assert names == ["step_00000009", "step_00000010"]


def test_the_time_of_a_save_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tiny_run(save=tmp_path, save_interval=4)).fit()
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows if "save_seconds" in row] == [5]
    out = capsys.readouterr().out
    for name in ("step_00000004", "step_00000006"):
        assert f"checkpoint {name} | training waited 0." in out


def test_a_save_that_fails_in_the_background_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_run(save=tmp_path, steps=1000, save_interval=4)
    trainer = Trainer(TinyTask(seconds=0.01), config, ParallelContext.single())
    monkeypatch.setattr("core.checkpoint.saver.write_rank_file", full)
    with pytest.raises(CheckpointError, match="step_00000004 was not saved, rank 0 failed: 'No"):
        trainer.fit()
    assert 4 < trainer.state.position.step < 8  # before the next save
    assert list(tmp_path.glob("*step*")) == []


def _train_and_save(config: RunConfig[TinyConfig]) -> int:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(TinyTask(), config, ctx)
    assert trainer.fit()
    return trainer.state.position.step


def test_ranks_save_in_the_background_together(tmp_path: Path, pool: WorkerPool) -> None:
    config = tiny_run(save=tmp_path, dp=2, save_interval=1, keep_last=3)
    assert pool.run(_train_and_save, 2, config) == [6, 6]
    reader = open_checkpoint(tmp_path)
    reader.verify()
    assert reader.step == 6
    assert sum(name.startswith("rank_") for name in reader.index.files) == 2
    assert sorted(path.name for path in tmp_path.glob("*step_*")) == [
        f"step_0000000{step}" for step in (4, 5, 6)
    ]
