"""A resumed run reads the samples that the run before it would have read, or is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config.data import DataConfig
from core.config.run import RunConfig
from core.data.builder import build_datasets
from core.data.indexed_dataset import IndexedDatasetWriter
from core.errors import ConfigError
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerPool
from core.testing.tiny_task import TinyConfig, TinyTask, tiny_run
from core.training.data_order import sample_order
from core.training.trainer import Trainer


class CorpusTask(TinyTask):
    """The tiny model on a real corpus."""

    def make_datasets(self, data: DataConfig, tokenizer: Any, num_samples: Any, seed: int) -> Any:
        return build_datasets(data, vocab_size=11, eod=None, num_samples=num_samples, seed=seed)


LENGTHS = [5 + i % 7 for i in range(40)]


def write_corpus(prefix: Path, lengths: list[int] = LENGTHS) -> str:
    prefix.parent.mkdir(exist_ok=True)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for i, length in enumerate(lengths):
            writer.add_document([i % 11] * length)
        writer.finish()
    return str(prefix)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig[TinyConfig]:
    """A run of 4 steps that has stopped after the second."""
    run = tiny_run(save=tmp_path / "run", steps=4, exit_at_step=2)
    data = DataConfig(train=(write_corpus(tmp_path / "a" / "corpus"),), seq_length=6, num_workers=0)
    run = replace(run, data=data)
    Trainer(CorpusTask(), run, ParallelContext.single()).fit()
    return replace(run, train=replace(run.train, exit_at_step=None))


def go_on(config: RunConfig[TinyConfig], data: Any = None, **train: Any) -> int:
    config = replace(
        config,
        data=replace(config.data, **(data or {})),
        train=replace(config.train, **train),
    )
    trainer = Trainer(CorpusTask(), config, ParallelContext.single())
    first = trainer.state.position.step
    assert trainer.fit()
    return first


def test_the_same_data_goes_on(config: RunConfig[TinyConfig]) -> None:
    assert go_on(config) == 2


def test_a_corpus_that_was_moved_goes_on(config: RunConfig[TinyConfig], tmp_path: Path) -> None:
    moved = (tmp_path / "a").rename(tmp_path / "b") / "corpus"
    assert go_on(config, {"train": (str(moved),)}) == 2


def test_more_steps_of_the_same_epoch_go_on(config: RunConfig[TinyConfig]) -> None:
    assert go_on(config, steps=5) == 2


@pytest.mark.parametrize(
    ("data", "train", "what"),
    [
        ({}, {"seed": 5}, "seed is 5, and was 1234"),
        ({"seq_length": 5}, {}, "sequence length is 5, and was 6"),
        ({"split": "5,5,0"}, {}, r"documents of the split 2 is 20, and was 39"),
        ({}, {"steps": 40}, "epochs is [0-9]+, and was 1"),
        ({"train": "longer"}, {}, "corpus tokens is"),
        ({"train": "other"}, {}, "checksum of sequence lengths is"),
        ({"train": "blend"}, {}, "weights is"),
    ],
)
def test_another_order_is_refused(
    config: RunConfig[TinyConfig], tmp_path: Path, data: Any, train: Any, what: str
) -> None:
    corpora: dict[str, tuple[str, ...]] = {
        "longer": (write_corpus(tmp_path / "c" / "longer", [*LENGTHS, 5]),),
        "other": (write_corpus(tmp_path / "c" / "other", LENGTHS[::-1]),),
    }
    corpora["blend"] = (*corpora["longer"], *corpora["other"])
    if "train" in data:
        data = {"train": corpora[data["train"]]}
    with pytest.raises(ConfigError, match=what) as error:
        go_on(config, data, **train)
    assert "--train.allow-changed-data" in str(error.value)
    assert go_on(config, data, **train, allow_changed_data=True) == 2
    # What is saved from there on is the new order.
    assert go_on(config, data, **{**train, "steps": train.get("steps", 4) + 1}) > 2


def test_load_into_another_folder_may_be_of_any_data(
    config: RunConfig[TinyConfig], tmp_path: Path
) -> None:
    config = replace(config, load=config.save, save=str(tmp_path / "fine"))
    assert go_on(config, seed=5) == 2


def test_an_older_checkpoint_is_not_asked(
    config: RunConfig[TinyConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = replace(config, save=str(tmp_path / "old"))
    stopped = replace(old, train=replace(old.train, exit_at_step=2))
    monkeypatch.setattr("core.training.trainer.sample_order", lambda dataset, seed: {})
    Trainer(CorpusTask(), stopped, ParallelContext.single()).fit()
    assert go_on(old, seed=5) == 2


def test_a_blend_is_the_same_when_it_is_longer(tmp_path: Path) -> None:
    corpora = tuple(write_corpus(tmp_path / name / "corpus") for name in "ab")

    def order(num_samples: int) -> dict[str, Any]:
        data = DataConfig(train=("3", corpora[0], "1", corpora[1]), seq_length=6)
        (dataset, _, _) = build_datasets(
            data, vocab_size=11, eod=None, num_samples=(num_samples, 0, 0), seed=1
        )
        return sample_order(dataset, 1)

    assert order(10) == order(12)
    assert order(10) != order(400)
    assert len(order(10)["data"]["source"]) == 2


def _start_with(config: RunConfig[TinyConfig], own: Any) -> int | str:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    if ctx.world.rank == 1:
        parts = {name: replace(getattr(config, name), **fields) for name, fields in own.items()}
        config = replace(config, **parts)
    try:
        return Trainer(CorpusTask(), config, ctx).state.position.step
    except ConfigError as error:
        return str(error)


def test_all_ranks_train_the_same(tmp_path: Path, pool: WorkerPool) -> None:
    corpora = [
        write_corpus(tmp_path / "a" / "corpus"),
        write_corpus(tmp_path / "b" / "corpus"),
        write_corpus(tmp_path / "c" / "corpus", LENGTHS[::-1]),
    ]
    data = DataConfig(train=(corpora[0],), seq_length=6, num_workers=0)
    config = replace(tiny_run(dp=2), data=data)
    # Paths may differ.
    assert pool.run(_start_with, 2, config, {"data": {"train": (corpora[1],)}}) == [0, 0]
    for own, what in (
        ({"train": {"save_interval": 3}}, "train, save_interval is 3, and 0 on rank 0"),
        ({"optimizer": {"lr": 0.1}}, "optimizer, lr is 0.1, and 0.05 on rank 0"),
        ({"data": {"train": (corpora[2],)}}, "sample order, data, checksum of sequence lengths is"),
    ):
        for sentence in pool.run(_start_with, 2, config, own):
            assert f"rank 1 was started with other options or data than rank 0: {what}" in sentence
