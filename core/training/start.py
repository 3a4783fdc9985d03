"""What a run may start from: the newest complete checkpoint in --save, then --load; then the
weights of --init-from, of a checkpoint or from Hugging Face; then random ones. Here are the
checkpoints.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoint.directory import candidates
from core.checkpoint.index import INDEX_NAME, check_compatible
from core.checkpoint.reader import CheckpointReader, no_checkpoint
from core.config.run import RunConfig
from core.errors import CheckpointError, ConfigError, DamagedCheckpointError


@dataclass(frozen=True)
class StartCandidates:
    """Step directories that a run may start from."""

    paths: list[Path]
    """The first that is not damaged counts. One that is named stands alone."""
    problem: str | None = None
    """What is wrong with the file `latest`, if anything."""
    weights_alone: bool = False
    """The run takes their weights and begins at step 0."""


def start_candidates(config: RunConfig[Any]) -> StartCandidates:
    """The checkpoints that a run may start from, if any.

    Raises:
        CheckpointError: there is none in `--load`.
        ConfigError: `--init-from` is what the run would start from, and has no weights.
    """
    if config.save is not None:
        # Were all of these damaged, the run must not start again and write over what is left.
        found, problem = candidates(Path(config.save))
        if found:
            return StartCandidates(found, problem)
    if config.load is not None:
        found, problem = _checkpoints(Path(config.load))
        if not found:
            raise no_checkpoint(Path(config.load))
        return StartCandidates(found, problem)
    source = config.init_from
    if source is None or (Path(source) / "config.json").is_file():
        return StartCandidates([])
    found, problem = _checkpoints(Path(source))
    if not found:
        raise ConfigError(
            f"--init-from {source} is neither a checkpoint nor a folder with a config.json: name a "
            "run's --save folder, or a local Hugging Face folder (`hf download NAME --local-dir "
            "FOLDER` makes one)"
        )
    return StartCandidates(found, problem, weights_alone=True)


def _checkpoints(folder: Path) -> tuple[list[Path], str | None]:
    """A step directory itself, or those in a folder."""
    return ([folder], None) if (folder / INDEX_NAME).is_file() else candidates(folder)


def open_compatible(path: Path, config: RunConfig[Any]) -> CheckpointReader:
    """Open a step directory for a run.

    Raises:
        DamagedCheckpointError: it is damaged.
        CheckpointError: it is of another architecture.
    """
    reader = CheckpointReader(path)
    check_compatible(reader.sections.get("config", {}), config.model, str(reader.path))
    return reader


def find_checkpoint(config: RunConfig[Any]) -> CheckpointReader | None:
    """The checkpoint that a run would start from, if any, by its index alone: `RunState.start`,
    which reads the data, may have to take an older one, and says so.

    Raises:
        CheckpointError: `--load` names none, all are damaged, or the first that is not is of
            another architecture.
        ConfigError: `--init-from` has no weights.
    """
    damaged: CheckpointError | None = None
    for path in start_candidates(config).paths:
        try:
            return open_compatible(path, config)
        except DamagedCheckpointError as error:
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    return None
