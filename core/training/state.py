"""Where a run stands: filled at its start (from what `start.py` finds), saved on the way."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint.assets import ASSETS_NAME, copy_assets
from core.checkpoint.directory import step_name
from core.checkpoint.index import saved_parameters
from core.checkpoint.reader import CheckpointReader
from core.checkpoint.saver import CheckpointSaver
from core.config.loading import to_toml
from core.config.run import RunConfig
from core.data_parallel.regions import DataParallel
from core.errors import CheckpointError, DamagedCheckpointError
from core.optim.step import OptimizerStep
from core.parallel.collectives import all_gather_objects
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.sharding import DeclaredParameter
from core.training.saved_state import ModuleState, load_parameters, load_state, saved_state
from core.training.start import StartCandidates, open_compatible, start_candidates
from core.training.task import TrainTask

CONFIG_FILE = "run.toml"
_LOG = logging.getLogger(__name__)


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


@dataclass
class RunState:
    """Everything that a checkpoint holds, at this rank."""

    task: TrainTask
    config: RunConfig[Any]
    ctx: ParallelContext
    data_parallel: DataParallel
    optimizer: OptimizerStep
    modules: ModuleState
    position: Position = dataclasses.field(default_factory=Position)
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What is remembered of the Hugging Face weights that training began with, in whichever run."""
    sample_order: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the order of training samples follows from (`core.training.data_order`)."""
    is_of_another_folder: bool = False
    """Whether the run goes on from a checkpoint of --load."""
    _saved_step: int | None = None
    _damaged: list[str] = dataclasses.field(default_factory=list)
    """Step directories that were passed over at the start."""
    _loaded_assets: Path | None = None
    _saver: CheckpointSaver | None = None

    @property
    def parameters(self) -> dict[str, DeclaredParameter]:
        """What this rank holds of the model."""
        return self.data_parallel.parameters

    def start(self) -> str:
        """Fill parameters and optimizer state; returns a line that says from what.

        Collective over the world: the ranks compare which checkpoints they see, and whether each
        could load its part. Of a folder with several checkpoints, one that is damaged for any rank
        is passed over by all, with a warning; a step directory that is named never is.

        Raises:
            CheckpointError: no checkpoint is intact, or one is of another architecture or not there
                for all ranks.
            ConfigError: --init-from has no weights.
            ConversionError: Hugging Face weights that do not fit.
        """
        found = start_candidates(self.config)
        reader = self._load_first_intact(found)
        if reader is not None and found.weights_alone:
            return f"starting from the weights of {reader.path}"
        if reader is not None:
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
        """Save this step unless that is done; returns the directory. With `async_save` the rest is
        done in the background: see `poll_saving` and `finish_saving`.

        Collective over the world. None without --save.

        Raises:
            CheckpointError: on every rank, if one could not write, now or at the save before.
        """
        if self.config.save is None or self._saved_step == self.position.step:
            return None
        self.data_parallel.wait_for_parameters()
        path = self._get_saver(Path(self.config.save)).save(
            self.position.step,
            {
                "family": self.task.family,
                "config": self.task.model_config,
                "run": to_toml(self.config),
                "source": self.source,
                "sample_order": self.sample_order,
                "train_state": {
                    **dataclasses.asdict(self.position),
                    "optimizer": self.optimizer.state_dict(),
                },
            },
        )
        self._saved_step = self.position.step
        return path

    def prepare_saving(self) -> None:
        """Do what saves need once, memory above all. Collective over the world.

        Raises:
            CheckpointError: it cannot be done.
        """
        if self.config.save is not None:
            self._get_saver(Path(self.config.save)).prepare()

    def poll_saving(self) -> None:
        """Look whether a save in the background has failed; cheap, no communication.

        Raises:
            CheckpointError: it has.
        """
        if self._saver is not None:
            self._saver.poll()

    def finish_saving(self) -> None:
        """Wait for a save in the background. Collective over the world.

        Raises:
            CheckpointError: on every rank, if it failed on one.
        """
        if self._saver is not None:
            self._saver.wait()

    def close_saving(self, seconds: float = 0.0) -> None:
        """Give memory back, once a save in the background is done or these seconds are over. No
        communication: a run that fails may still get the checkpoint that it was writing.
        """
        if self._saver is not None:
            self._saver.close(seconds)

    def _get_saver(self, folder: Path) -> CheckpointSaver:
        if self._saver is None:
            train = self.config.train
            self._saver = CheckpointSaver(
                folder,
                [
                    *saved_parameters(self.parameters),
                    *saved_state(self.optimizer.state_tensors()),
                    *self.modules.tensors,
                ],
                self.ctx,
                keep_last=train.keep_last or None,
                keep_every=train.keep_every or None,
                assets=folder / ASSETS_NAME,
                # The save that ends a run is waited for: alone it needs no staging.
                asynchronous=train.async_save and train.save_interval > 0,
                timeout=train.hang_timeout_seconds or None,
            )
            self._saver.count_as_damaged(self._damaged)
        return self._saver

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

    def _load_first_intact(self, candidates: StartCandidates) -> CheckpointReader | None:
        """Load the newest checkpoint that no rank finds damaged; None if there is no checkpoint."""
        paths = self._agree_on(candidates)
        newest: CheckpointError | None = None
        for path in paths:
            reader: CheckpointReader | None = None
            own: CheckpointError | None = None
            try:
                reader = open_compatible(path, self.config)
                self._load(reader, candidates.weights_alone)
            except CheckpointError as error:
                own = error
            errors = all_gather_objects(own, self.ctx.world)
            found = [error for error in errors if error is not None]
            for other in found:
                if not isinstance(other, DamagedCheckpointError):
                    raise other
            if reader is not None and not found:
                self._take_over(reader, candidates.weights_alone)
                return reader
            newest = newest or found[0]
            self._damaged.append(path.name)
            if len(paths) > 1:
                self._warn(f"passing over {path.name}: {found[0]}")
        if newest is not None:
            raise newest
        return None

    def _agree_on(self, candidates: StartCandidates) -> list[Path]:
        """Ranks that start from different steps would train a mixture of two models."""
        if candidates.problem is not None:
            self._warn(candidates.problem)
        seen = all_gather_objects([str(path) for path in candidates.paths], self.ctx.world)
        for rank, others in enumerate(seen):
            if others[:1] != seen[0][:1]:
                raise CheckpointError(
                    f"rank 0 would start from {(*seen[0], 'no checkpoint')[0]}, rank {rank} from "
                    f"{(*others, 'none')[0]}: --save, --load and --init-from must be folders that "
                    "all machines share"
                )
        return [path for path in candidates.paths if all(str(path) in others for others in seen)]

    def _warn(self, sentence: str) -> None:
        if self.ctx.world.rank == 0:
            _LOG.warning("%s", sentence)

    def _load(self, reader: CheckpointReader, weights_alone: bool) -> None:
        """Fill tensors, and nothing else: another rank may find its part damaged, and then the next
        checkpoint must be able to fill all of them again.
        """
        if self.ctx.world.rank == 0:  # which hands them on
            reader.check_assets()
        remainder = self.config.precision.master_weights == "remainder"
        load_parameters(reader, saved_parameters(self.parameters), remainder=remainder)
        if not weights_alone:
            dropped = self.modules.load(reader)
            if dropped is not None:
                self._warn(dropped)
            if reader.sections.get("train_state") is not None:
                load_state(reader, self.optimizer.state_tensors())
                return
        # Also where there is nothing else: converters import writes weights alone.
        for state in self.optimizer.state_tensors():
            state.tensor.zero_()

    def _take_over(self, reader: CheckpointReader, weights_alone: bool) -> None:
        """What a loaded checkpoint says beside its tensors."""
        self.source = reader.sections.get("source") or {}
        assets = reader.path / ASSETS_NAME
        self._loaded_assets = assets if assets.is_dir() else None
        state = None if weights_alone else reader.sections.get("train_state")
        if state is None:
            self.optimizer.adamw.refresh_master_from_parameters()
            return
        self.optimizer.load_state_dict(state["optimizer"])
        names = [field.name for field in dataclasses.fields(Position)]
        self.position = Position(**{name: state[name] for name in names})
        self.is_of_another_folder = self.config.save is None
        if self.config.save is not None:
            own = Path(self.config.save) / step_name(self.position.step)
            self.is_of_another_folder = reader.path.parent != own.parent
            self._saved_step = self.position.step if reader.path == own else None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}): free disk space, or choose another "
            "folder with --save"
        ) from error
