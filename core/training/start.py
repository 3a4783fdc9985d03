"""What a run may start from: the newest complete checkpoint in --save, then --load; then the
Hugging Face weights of --init-from, then random weights. Here are the checkpoints.
"""

from pathlib import Path
from typing import Any

from core.checkpoint.directory import candidates
from core.checkpoint.index import INDEX_NAME, check_compatible
from core.checkpoint.reader import CheckpointReader, no_checkpoint
from core.config.run import RunConfig
from core.errors import CheckpointError, DamagedCheckpointError


def start_candidates(config: RunConfig[Any]) -> tuple[list[Path], str | None]:
    """Step directories that a run may start from, the first that is not damaged counting; and what
    is wrong with the file `latest`, if anything. A step directory that is named stands alone.

    Raises:
        CheckpointError: there is none in `--load`.
    """
    if config.save is not None:
        # Were all of these damaged, the run must not start again and write over what is left.
        found, problem = candidates(Path(config.save))
        if found:
            return found, problem
    if config.load is None:
        return [], None
    load = Path(config.load)
    if (load / INDEX_NAME).is_file():
        return [load], None
    found, problem = candidates(load)
    if not found:
        raise no_checkpoint(load)
    return found, problem


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
    """
    damaged: CheckpointError | None = None
    for path in start_candidates(config)[0]:
        try:
            return open_compatible(path, config)
        except DamagedCheckpointError as error:
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    return None
