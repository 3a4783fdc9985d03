"""Where a run stands: found at its start, saved on the way.

At the start the newest complete checkpoint in --save counts, then --load, then the Hugging Face
weights of --init-from, then random weights.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.checkpoint.assets import ASSETS_NAME, copy_assets
from core.checkpoint.directory import step_directories, step_name
from core.checkpoint.index import (
    SavedTensor,
    check_compatible,
    model_key,
    optim_key,
    saved_parameters,
)
from core.checkpoint.reader import CheckpointReader, open_checkpoint
from core.checkpoint.writer import save_checkpoint
from core.config.loading import to_toml
from core.config.run import RunConfig
from core.data_parallel.regions import DataParallel
from core.errors import CheckpointError
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.sharding import DeclaredParameter
from core.training.task import TrainTask

CONFIG_FILE = "run.toml"


@dataclass
class Position:
    """How far a run has come."""

    step: int = 0
    """Steps done, skipped ones included."""
    consumed_samples: int = 0
    """Training samples of those steps, over all ranks."""
    skipped_steps: int = 0
    """Steps whose update was left out."""
    consecutive_skips: int = 0
    """Of these, the last in a row."""


def find_checkpoint(config: RunConfig[Any]) -> CheckpointReader | None:
    """The checkpoint that a run starts from, if any; reads indices only.

    Raises:
        CheckpointError: `--load` names none, all in `--save` are damaged, or the checkpoint is of
            another architecture.
    """
    if config.save is not None and step_directories(Path(config.save)):
        # Were all of them passed over, the run would start again and write over what is left.
        reader = open_checkpoint(Path(config.save))
    elif config.load is not None:
        reader = open_checkpoint(Path(config.load))
    else:
        return None
    check_compatible(reader.sections.get("config", {}), config.model, str(reader.path))
    return reader


@dataclass
class RunState:
    """Everything that a checkpoint holds, at this rank."""

    task: TrainTask
    config: RunConfig[Any]
    ctx: ParallelContext
    data_parallel: DataParallel
    optimizer: OptimizerStep
    position: Position = dataclasses.field(default_factory=Position)
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is remembered of the Hugging Face weights that training began with."""
    _saved_step: int | None = None
    _loaded_assets: Path | None = None

    @property
    def parameters(self) -> dict[str, DeclaredParameter]:
        """What this rank holds of the model."""
        return self.data_parallel.parameters

    def start(self) -> str:
        """Fill parameters and optimizer state; returns a line that says from what.

        Collective over the world: the ranks compare which checkpoint they see.

        Raises:
            CheckpointError: a checkpoint that is damaged, of another architecture, or not the same
                for all ranks.
            ConversionError: Hugging Face weights that do not fit.
        """
        reader = find_checkpoint(self.config)
        self._agree_on(reader)
        if reader is not None:
            self._load(reader)
            return f"going on from {reader.path} at step {self.position.step}"
        if self.config.init_from is not None:
            self.source = dict(
                self.task.import_weights(Path(self.config.init_from), self.parameters)
            )
            self.optimizer.adamw.refresh_master_from_parameters()
            return f"starting from the weights of {self.config.init_from}"
        initialize_parameters(self.parameters, self.config.train.seed)
        self.optimizer.adamw.refresh_master_from_parameters()
        return f"starting from random weights, seed {self.config.train.seed}"

    def save(self) -> Path | None:
        """Write a checkpoint of this step unless there is one; returns its directory.

        Collective over the world. None without --save.

        Raises:
            CheckpointError: on every rank, if one could not write.
        """
        if self.config.save is None or self._saved_step == self.position.step:
            return None
        train = self.config.train
        self.data_parallel.wait_for_parameters()
        path = save_checkpoint(
            Path(self.config.save),
            self.position.step,
            [*saved_parameters(self.parameters), *self._optimizer_tensors()],
            {
                "family": self.task.family,
                "config": self.task.model_config,
                "run": to_toml(self.config),
                "source": self.source,
                "train_state": {
                    **dataclasses.asdict(self.position),
                    "optimizer": self.optimizer.state_dict(),
                },
            },
            self.ctx,
            keep_last=train.keep_last or None,
            keep_every=train.keep_every or None,
            assets=Path(self.config.save) / ASSETS_NAME,
        )
        self._saved_step = self.position.step
        return path

    def write_companions(self) -> None:
        """Leave beside the checkpoints what does not change: the run's configuration, and in `hf/`
        tokenizer and other small files, which go into every checkpoint. Rank 0 only.

        Raises:
            CheckpointError: --save cannot be written.
        """
        if self.config.save is None or self.ctx.world.rank:
            return
        folder = Path(self.config.save).resolve()
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".{CONFIG_FILE}.tmp"
            try:
                aside.write_text(to_toml(self.config), encoding="utf-8")
                os.replace(aside, folder / CONFIG_FILE)
            finally:
                aside.unlink(missing_ok=True)
            own = folder / ASSETS_NAME
            first = self._loaded_assets or self.source.get("assets")
            for assets in (first, self.config.tokenizer):
                if assets is not None and Path(assets).is_dir() and Path(assets).resolve() != own:
                    copy_assets(Path(assets), own)

    def _agree_on(self, reader: CheckpointReader | None) -> None:
        """Ranks that start from different steps would train a mixture of two models."""
        own = None if reader is None else str(reader.path)
        if self.ctx.world.group is None:
            return
        seen: list[str | None] = [None] * self.ctx.world.size
        dist.all_gather_object(seen, own, group=self.ctx.world.group)
        for rank, other in enumerate(seen):
            if other != seen[0]:
                raise CheckpointError(
                    f"rank 0 would start from {seen[0] or 'no checkpoint'}, rank {rank} from "
                    f"{other or 'none'}: --save and --load must be folders that all machines share"
                )

    def _load(self, reader: CheckpointReader) -> None:
        self.source = reader.sections.get("source") or {}
        assets = reader.path / ASSETS_NAME
        self._loaded_assets = assets if assets.is_dir() else None
        # Another precision than the checkpoint's is fine: from its masters, if it has any.
        stored = reader.tensors
        parameters = [
            dataclasses.replace(saved, name=master)
            if (master := optim_key("master", name)) in stored
            and stored[saved.name].dtype != saved.tensor.dtype
            else saved
            for name, saved in zip(self.parameters, saved_parameters(self.parameters), strict=True)
        ]
        reader.load(parameters, convert=True)
        state = reader.sections.get("train_state")
        if state is None:  # weights alone, as converters import writes them
            self.optimizer.adamw.refresh_master_from_parameters()
            return
        masters = optim_key("master", "")
        tensors = [
            dataclasses.replace(saved, name=model_key(saved.name.removeprefix(masters)))
            if saved.name.startswith(masters) and saved.name not in stored
            else saved
            for saved in self._optimizer_tensors()
        ]
        reader.load(tensors, convert=True)
        self.optimizer.load_state_dict(state["optimizer"])
        names = [field.name for field in dataclasses.fields(Position)]
        self.position = Position(**{name: state[name] for name in names})
        if self.config.save is not None:
            own = Path(self.config.save) / step_name(self.position.step)
            self._saved_step = self.position.step if reader.path == own else None

    def _optimizer_tensors(self) -> list[SavedTensor]:
        return [
            SavedTensor(
                optim_key(state.name, state.fragment.name),
                state.fragment.global_shape,
                state.fragment.copies,
                state.tensor,
            )
            for state in self.optimizer.state_tensors()
        ]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}): free disk space, or choose another "
            "folder with --save"
        ) from error
