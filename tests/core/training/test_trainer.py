import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.checkpoint.assets import ASSETS_NAME
from core.checkpoint.index import saved_parameters
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.saver import save_checkpoint
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import BatchRampConfig
from core.errors import CheckpointError, ConfigError, TrainingError
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerError, WorkerPool
from core.testing.parity import gather_fragments
from core.testing.tiny_task import TinyConfig, TinyDataset, TinyTask, tiny_run
from core.training.metrics import METRICS_FILE
from core.training.state import Position
from core.training.trainer import Trainer


def trained(config: RunConfig[TinyConfig], task: TinyTask | None = None) -> Trainer:
    trainer = Trainer(task or TinyTask(), config, ParallelContext.single())
    assert trainer.fit()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.chunks[0].named_parameters()}


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and whole optimizer state; collective."""
    trainer.state.data_parallel.wait_for_parameters()
    found = weights(trainer)
    states = list(trainer.optimizer.state_tensors())
    for kind in sorted({state.name for state in states}):
        pieces = ((state.fragment, state.tensor) for state in states if state.name == kind)
        whole = gather_fragments(pieces, trainer.ctx)
        found |= {f"{kind}/{name}": tensor for name, tensor in whole.items()}
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol, msg=name)


def test_loss_falls(tmp_path: Path) -> None:
    trained(tiny_run(save=tmp_path, steps=60))
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(11), abs=0.3)
    assert losses[-1] < 0.5


@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
@pytest.mark.parametrize("second_loss", [False, True])
def test_accumulation_does_not_matter(
    tmp_path: Path, micro_batch_size: int, second_loss: bool
) -> None:
    one = trained(tiny_run(save=tmp_path / "a"), TinyTask(second_loss=second_loss))
    other = trained(
        tiny_run(save=tmp_path / "b", micro_batch_size=micro_batch_size),
        TinyTask(second_loss=second_loss),
    )
    assert_equal(everything(one), everything(other), 1e-12)
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-12)


def _train_rank(config: RunConfig[TinyConfig]) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(TinyTask(second_loss=True), config, ctx)
    assert trainer.fit()
    return everything(trainer)


def test_data_parallel_equals_one_process(tmp_path: Path, pool: WorkerPool) -> None:
    options: dict[str, Any] = {"eval_interval": 3, "eval_steps": 2, "save_interval": 2}
    single = trained(tiny_run(save=tmp_path / "a", **options), TinyTask(second_loss=True))
    ranks = pool.run(_train_rank, 2, tiny_run(save=tmp_path / "b", dp=2, **options))
    for rank in ranks:
        assert_equal(everything(single), rank, 1e-12)
    timed = ("per_second", "tflops", "seconds", "gib")
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        for name in a:
            if not any(part in name for part in timed):
                assert a[name] == pytest.approx(b[name], rel=1e-12), name


def _replicated_rank(config: RunConfig[TinyConfig]) -> dict[str, Tensor]:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(TinyTask(), config, ctx)
    assert trainer.fit()
    return everything(trainer)


def test_tensor_parallel_ranks_are_counted_once(tmp_path: Path, pool: WorkerPool) -> None:
    """The tiny model is replicated over tp: twice the ranks, the same samples and tokens."""
    single = trained(tiny_run(save=tmp_path / "a"))
    config = tiny_run(save=tmp_path / "b")
    config = replace(config, parallel=ParallelConfig(tp=2))
    for rank in pool.run(_replicated_rank, 2, config):
        assert_equal(everything(single), rank, 1e-12)
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-12)


def manual_loss(trainer: Trainer, samples: range) -> float:
    task, config = TinyTask(), trainer.config
    dataset = TinyDataset(max(samples) + 1, config.data.seq_length, 11, task.uneven, 0)
    total, count = 0.0, 0
    for index in samples:
        sample = {name: torch.from_numpy(value) for name, value in dataset[index].items()}
        losses = F.cross_entropy(
            trainer.model.chunks[0](sample["tokens"][None], None)[0],
            sample["labels"],
            reduction="none",
        )
        total += float(losses.detach()[sample["loss_mask"]].sum())
        count += int(sample["loss_mask"].sum())
    return total / count


def test_evaluation_is_the_mean_over_valid_tokens(tmp_path: Path) -> None:
    trainer = trained(tiny_run(save=tmp_path, eval_interval=4, eval_steps=3, micro_batch_size=4))
    losses = [row for row in rows(tmp_path) if "validation_loss" in row]
    assert [row["step"] for row in losses] == [4, 6]
    expected = manual_loss(trainer, range(24))
    assert losses[-1]["validation_loss"] == pytest.approx(expected, rel=1e-12)
    assert trainer.model.chunks[0].training


def test_a_step_without_valid_tokens_is_consumed_but_not_applied(tmp_path: Path) -> None:
    one_step = trained(tiny_run(save=tmp_path / "one", steps=1), TinyTask(count_nothing_before=8))
    fresh = Trainer(TinyTask(), tiny_run(), ParallelContext.single())
    assert_equal(weights(one_step), weights(fresh))
    (row,) = rows(tmp_path / "one")
    assert row["loss"] is None
    assert row["skipped_steps"] == 1
    assert row["consumed_samples"] == 8
    after = trained(tiny_run(steps=3), TinyTask(count_nothing_before=8))
    assert after.state.position.skipped_steps == 1
    assert after.optimizer.state_dict()["step_count"] == 2


def test_infinite_losses_are_skipped_up_to_a_limit(tmp_path: Path) -> None:
    trainer = trained(tiny_run(save=tmp_path), TinyTask(infinite_at=(1, 3)))
    assert trainer.state.position.skipped_steps == 2
    assert trainer.state.position.consecutive_skips == 0
    assert all(bool(x.isfinite().all()) for x in everything(trainer).values())
    assert [row["skipped_steps"] for row in rows(tmp_path)] == [0, 1, 1, 2, 2, 2]
    endless = Trainer(
        TinyTask(infinite_at=range(2, 100)), tiny_run(steps=40), ParallelContext.single()
    )
    with pytest.raises(TrainingError, match="10 steps in a row were skipped"):
        endless.fit()
    # Read a step late.
    assert endless.state.position.step == 13


def test_resume_twice_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "save_interval": 2, "eval_interval": 3}
    options["ramp"] = BatchRampConfig(start=4, increment=2, samples=20)
    whole = trained(tiny_run(save=tmp_path / "whole", micro_batch_size=2, **options))
    config = tiny_run(save=tmp_path / "cut", micro_batch_size=2, **options)
    for step, resumed in ((5, 0), (9, 4)):
        failing = Trainer(TinyTask(fail_at=(0, step)), config, ParallelContext.single())
        assert failing.state.position.step == resumed
        with pytest.raises(RuntimeError, match="made to fail"):
            failing.fit()
    last = Trainer(TinyTask(), config, ParallelContext.single())
    assert last.state.position.step == 8
    assert last.fit()
    assert_equal(everything(whole), everything(last))
    assert last.optimizer.state_dict() == whole.optimizer.state_dict()
    assert last.state.position == whole.state.position
    # Rows that the killed runs wrote after their last checkpoint are not there twice.
    names = ("step", "loss", "validation_loss", "grad_norm", "learning_rate", "consumed_samples")
    assert [[row.get(n) for n in names] for row in rows(tmp_path / "cut")] == [
        [row.get(n) for n in names] for row in rows(tmp_path / "whole")
    ]


def test_skips_in_a_row_are_counted_over_a_resume(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, steps=40, save_interval=1, keep_last=1)
    failing = Trainer(
        TinyTask(infinite_at=range(2, 40), fail_at=(0, 8)), config, ParallelContext.single()
    )
    with pytest.raises(RuntimeError, match="made to fail"):
        failing.fit()
    again = Trainer(TinyTask(infinite_at=range(2, 40)), config, ParallelContext.single())
    assert again.state.position.consecutive_skips == 6
    with pytest.raises(TrainingError, match="10 steps in a row"):
        again.fit()


def test_save_comes_before_load_and_load_before_init_from(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    (hf / "tokenizer.json").write_text("{}")
    config = tiny_run(save=tmp_path / "a", init_from=hf, steps=1)
    trainer = Trainer(TinyTask(), config, ParallelContext.single())
    assert all(bool((p == 1.0).all()) for p in trainer.model.chunks[0].parameters())
    trainer.fit()
    reader = open_checkpoint(tmp_path / "a")
    assert reader.sections["source"]["config"] == {"architectures": ["Tiny"]}
    assert (reader.path / ASSETS_NAME / "tokenizer.json").read_text() == "{}"

    more = tiny_run(steps=2).train
    loaded = replace(config, load=config.save, save=str(tmp_path / "b"), train=more)
    second = Trainer(TinyTask(), loaded, ParallelContext.single())
    assert second.state.position.step == 1
    assert_equal(weights(second), weights(trainer))
    second.fit()
    # What was remembered of the source goes on with the new checkpoints.
    reader = open_checkpoint(tmp_path / "b")
    assert reader.sections["source"]["config"] == {"architectures": ["Tiny"]}
    assert (reader.path / ASSETS_NAME / "tokenizer.json").exists()
    third = Trainer(TinyTask(), loaded, ParallelContext.single())
    assert third.state.position.step == 2


def test_init_from_takes_the_weights_of_a_checkpoint_alone(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    (hf / "tokenizer.json").write_text("{}")
    first = trained(tiny_run(save=tmp_path / "a", init_from=hf, steps=3, save_interval=1))
    config = tiny_run(save=tmp_path / "b", init_from=tmp_path / "a", steps=2)
    second = Trainer(TinyTask(), config, ParallelContext.single())
    assert_equal(weights(second), weights(first))
    assert second.state.position == Position()
    for state in second.optimizer.state_tensors():
        if state.name != "master":
            assert not state.tensor.any()
    assert second.fit()
    # The optimizer and the data begin anew: as from the same weights without a past.
    weights_alone = tmp_path / "c"
    save_checkpoint(
        weights_alone,
        0,
        saved_parameters(first.state.parameters),
        {"config": TinyConfig()},
        ParallelContext.single(),
    )
    other = replace(tiny_run(save=tmp_path / "d", steps=2), load=str(weights_alone))
    assert_equal(everything(trained(other)), everything(second))
    # What was remembered of the Hugging Face weights goes on, and so does the run itself.
    reader = open_checkpoint(tmp_path / "b")
    assert reader.sections["source"]["config"] == {"architectures": ["Tiny"]}
    assert (reader.path / ASSETS_NAME / "tokenizer.json").exists()
    again = Trainer(TinyTask(), config, ParallelContext.single())
    assert again.state.position.step == 2


def test_init_from_passes_over_a_damaged_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tiny_run(save=tmp_path / "a", steps=2, save_interval=1, keep_last=0))
    (file,) = (tmp_path / "a" / "step_00000002").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    config = tiny_run(init_from=tmp_path / "a")
    trainer = Trainer(TinyTask(), config, ParallelContext.single())
    assert f"passing over step_00000002: {file} is damaged" in caplog.text
    loaded = replace(tiny_run(), load=str(tmp_path / "a" / "step_00000001"))
    expected = Trainer(TinyTask(), loaded, ParallelContext.single())
    assert_equal(weights(trainer), weights(expected))
    named = tiny_run(init_from=tmp_path / "a" / "step_00000002")
    with pytest.raises(CheckpointError, match="is damaged"):
        Trainer(TinyTask(), named, ParallelContext.single())


def _start_rank(config: RunConfig[TinyConfig]) -> dict[str, Tensor]:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    return weights(Trainer(TinyTask(), config, ctx))


def test_init_from_at_another_layout(tmp_path: Path, pool: WorkerPool) -> None:
    pool.run(_train_rank, 2, tiny_run(save=tmp_path / "a", dp=2, steps=2))
    single = Trainer(TinyTask(), tiny_run(init_from=tmp_path / "a"), ParallelContext.single())
    for rank in pool.run(_start_rank, 2, tiny_run(init_from=tmp_path / "a", dp=2)):
        assert_equal(rank, weights(single))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, steps=1)
    trained(config)
    other = replace(config, model=TinyConfig(hidden_size=16))
    for config in (other, replace(other, save=None, init_from=str(tmp_path))):
        with pytest.raises(CheckpointError, match="hidden_size is 8 there and 16 here"):
            Trainer(TinyTask(model_config=other.model), config, ParallelContext.single())


def test_a_finished_run_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(save=tmp_path, steps=1)
    trained(config)
    capsys.readouterr()
    trained(config)
    assert "nothing to do: step 1 is the last" in capsys.readouterr().out


@pytest.mark.parametrize("save", ["b", None])
def test_a_loaded_run_that_has_ended_is_no_success(tmp_path: Path, save: str | None) -> None:
    trained(tiny_run(save=tmp_path / "a", steps=3))
    config = tiny_run(save=None if save is None else tmp_path / save, steps=3)
    config = replace(config, load=str(tmp_path / "a"))
    trainer = Trainer(TinyTask(), config, ParallelContext.single())
    with pytest.raises(ConfigError, match=r"of step 3, from .* end at step 3: raise --train.steps"):
        trainer.fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_other_precision_starts_from_the_masters(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path / "a", steps=2)
    trainer = trained(config)
    low = replace(
        config,
        precision=PrecisionConfig(dtype="bf16"),
        load=config.save,
        save=str(tmp_path / "b"),
        train=tiny_run(steps=3).train,
    )
    half = Trainer(TinyTask(), low, ParallelContext.single())
    masters = {
        s.fragment.name: s.tensor for s in half.optimizer.state_tensors() if s.name == "master"
    }
    for name, weight in weights(trainer).items():
        assert torch.equal(masters[name], weight.float())
        assert torch.equal(weights(half)[name], weight.bfloat16())
    half.fit()
    back = replace(low, precision=config.precision, load=str(tmp_path / "b"), save=None)
    wide = Trainer(TinyTask(), back, ParallelContext.single())
    for state in half.optimizer.state_tensors():
        if state.name == "master":
            assert torch.equal(weights(wide)[state.fragment.name], state.tensor.double())


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_another_16_bit_precision_starts_from_the_masters(
    tmp_path: Path, first: Any, second: Any
) -> None:
    config = tiny_run(save=tmp_path, steps=2)
    trained(replace(config, precision=PrecisionConfig(dtype=first)))
    other = replace(config, precision=PrecisionConfig(dtype=second))
    trainer = Trainer(TinyTask(), other, ParallelContext.single())
    found = weights(trainer)
    for state in trainer.optimizer.state_tensors():
        if state.name == "master":
            name = state.fragment.name
            assert torch.equal(found[name], state.tensor.to(found[name].dtype))


def test_a_damaged_save_folder_is_not_begun_afresh(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, steps=2)
    trained(config)
    file = tmp_path / "step_00000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"step_00000002/rank_00000.safetensors has \d+ bytes"
    ):
        Trainer(TinyTask(), config, ParallelContext.single())


def test_exit_at_step_holds_for_every_start(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, exit_at_step=3)
    for _ in range(2):
        trainer = Trainer(TinyTask(), config, ParallelContext.single())
        assert not trainer.fit()
        assert trainer.state.position.step == 3


def test_time_limit_stops_and_saves(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, steps=1000, exit_duration_minutes=0.005)
    trainer = Trainer(TinyTask(seconds=0.01), config, ParallelContext.single())
    assert not trainer.fit()
    assert 0 < trainer.state.position.step < 1000
    assert open_checkpoint(tmp_path).step == trainer.state.position.step


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tiny_run(save=tmp_path, log_interval=3))
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split(" |")[0] for line in lines] == ["step 3/6", "step 6/6"]
    for part in ("loss", "tokens/s", "GiB", "left"):
        assert part in lines[0]
    assert err == ""
    assert "tiny: 176 parameters in fp64" in out


def test_weights_alone_start_at_step_0(tmp_path: Path) -> None:
    """What `converters import` writes has no training state."""
    whole = trained(tiny_run(steps=3))
    save_checkpoint(
        tmp_path / "weights",
        0,
        saved_parameters(whole.state.parameters),
        {"config": TinyConfig(), "source": {"config": {"a": 1}}},
        ParallelContext.single(),
    )
    config = replace(tiny_run(), load=str(tmp_path / "weights"))
    trainer = Trainer(TinyTask(), config, ParallelContext.single())
    assert_equal(weights(trainer), weights(whole))
    assert trainer.state.position == Position()
    assert trainer.state.source == {"config": {"a": 1}}


@pytest.mark.parametrize("size", [2, 16])
def test_a_resumed_run_may_have_another_batch(tmp_path: Path, size: int) -> None:
    first = tiny_run(save=tmp_path, steps=10, exit_at_step=8)
    assert not Trainer(TinyTask(), first, ParallelContext.single()).fit()
    trainer = trained(tiny_run(save=tmp_path, steps=10, global_batch_size=size))
    assert trainer.state.position == Position(step=10, consumed_samples=64 + 2 * size)


def test_ranks_that_see_different_checkpoints_are_refused(tmp_path: Path, pool: WorkerPool) -> None:
    trained(tiny_run(save=tmp_path, steps=1))
    with pytest.raises(WorkerError, match="must be folders that all machines share"):
        pool.run(_start_apart, 2, tiny_run(save=tmp_path, dp=2))


def _start_apart(config: RunConfig[TinyConfig]) -> None:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    if ctx.world.rank == 1:
        config = replace(config, save=f"{config.save}/elsewhere")
    Trainer(TinyTask(), config, ctx)


def test_rates_are_of_whole_steps(tmp_path: Path) -> None:
    """A step that is looked at earlier than others, before a save, took as long."""
    trained(tiny_run(save=tmp_path, save_interval=3, micro_batch_size=4), TinyTask(seconds=0.02))
    for row in rows(tmp_path):
        assert row["step_seconds"] >= 0.04
        assert row["tokens_per_second"] == pytest.approx(48 / row["step_seconds"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trainer = Trainer(
        TinyTask(), tiny_run(save=tmp_path / "file" / "run"), ParallelContext.single()
    )
    with pytest.raises(CheckpointError, match="run cannot be written"):
        trainer.fit()


def test_training_goes_on_after_a_stop(tmp_path: Path) -> None:
    config = tiny_run(save=tmp_path, steps=30, exit_duration_minutes=0.003)
    trainer = Trainer(TinyTask(seconds=0.002), config, ParallelContext.single())
    assert not trainer.fit()
    unlimited = trained(replace(config, train=tiny_run(steps=30).train))
    assert_equal(everything(unlimited), everything(trained(tiny_run(steps=30))))
