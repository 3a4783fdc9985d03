"""Step directories under a save root, published atomically.

root/latest                   names the newest step directory, with a checksum of the name
root/step_00000100/           index.json, rank_00000.safetensors, ..., hf/tokenizer.json, ...
root/.step_00000200.x1.tmp/   a save in progress, or what a killed one left
root/.step_00000100.old/      a step that is being replaced
"""

import errno
import logging
import os
import re
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import IO, Any

from core.checkpoint.index import INDEX_NAME, Index
from core.errors import CheckpointError, DamagedCheckpointError

LATEST_NAME = "latest"
POINTER_NAME = ".latest.tmp"
"""What `latest` is written as before it is moved into place."""
_STEP = re.compile(r"step_(\d{8,})")
_ASIDE = re.compile(r"\.(step_\d{8,})\.old")
_CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)
"""What file systems answer that cannot flush a directory."""
_LOG = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step_{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def step_directories(root: Path) -> dict[int, Path]:
    """Step directories under a root, complete or not, newest first.

    One that a save had set aside counts where that save was killed before it put another in place.
    """
    found = {}
    paths = {path.name: path for path in root.iterdir()} if root.is_dir() else {}
    for name, path in paths.items():
        aside = _ASIDE.fullmatch(name)
        match = _STEP.fullmatch(aside[1] if aside else name)
        if match and path.is_dir() and not (aside and aside[1] in paths):
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def _latest_text(name: str) -> str:
    return f"{name} crc32 {zlib.crc32(name.encode()):08x}\n"


def read_latest(root: Path) -> tuple[Path | None, str | None]:
    """The step directory that the file `latest` names, whether or not it is still there; and what
    is wrong with the file, if anything.
    """
    file = root / LATEST_NAME
    try:
        text = file.read_bytes().decode(errors="replace")
    except OSError as error:
        return None, f"{file} cannot be read ({error.strerror})"
    name = text.partition(" ")[0].removesuffix("\n")
    # The name alone was all that the first versions wrote.
    if _STEP.fullmatch(name) and text in (_latest_text(name), f"{name}\n"):
        return root / name, None
    return None, f"{file} is damaged"


def candidates(root: Path) -> tuple[list[Path], str | None]:
    """Step directories, complete or not, in the order in which a run would start from them: what
    `latest` names, then from the highest step down. And what is wrong with `latest`, if anything.
    """
    steps = step_directories(root)
    latest, problem = read_latest(root)
    if latest is None:
        problem = f"{problem}: the highest step counts as the newest"
        return list(steps.values()), problem if steps else None
    newest = steps.pop(_step_of(latest), None)  # under another name while it is being replaced
    if newest is None:
        return list(steps.values()), f"{latest}, which {root / LATEST_NAME} names, is missing"
    return [newest, *steps.values()], None


def newest_complete(root: Path) -> Path | None:
    """The first of the `candidates` whose index and files are there in full; None if there are no
    candidates. What is damaged on the way is named in a warning.

    Raises:
        CheckpointError: none is complete; the error is that of the newest.
    """
    paths, problem = candidates(root)
    if problem is not None:
        _LOG.warning("%s", problem)
    first: CheckpointError | None = None
    for path in paths:
        try:
            Index.read(path)
        except DamagedCheckpointError as error:
            first = first or error
            if len(paths) > 1:
                _LOG.warning("passing over %s: %s", path.name, error)
        else:
            return path
    if first is not None:
        raise first
    return None


def sync_directory(path: Path) -> None:
    """Flush the names in a directory to the disk, where its file system can: some that are mounted
    over a network or in user space refuse, and keep names in order all the same or not at all.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(file: IO[Any]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        sync_file(file)


def remove_leftovers(root: Path) -> None:
    """Remove what killed saves left; no other save may be running under `root`."""
    kept = step_directories(root).values()
    for path in (*root.glob(".step_*.tmp"), *root.glob(".step_*.old")):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def publish(root: Path, temporary: Path, index: Index) -> Path:
    """Turn a directory of written files into the newest checkpoint: add the index, flush, rename,
    move `latest`. A kill at any point leaves either the old state or the new one.

    A checkpoint of the same step is replaced.

    Raises:
        CheckpointError: a file that a rank has written cannot be seen from here.
        OSError: the disk is full, or the directory cannot be written.
    """
    temporary.stat()  # raises where it is gone, and no file of it with it
    for name, record in index.files.items():
        file = temporary / name
        if not file.is_file() or file.stat().st_size != record.size:
            raise CheckpointError(
                f"{file} was written by its rank but is not complete as seen from rank 0: the "
                "save directory must be one that all machines share"
            )
    name = step_name(index.step)
    _write_text(temporary / INDEX_NAME, index.dump())
    # All that takes space is written before the first rename, so that a full disk changes nothing.
    pointer = root / POINTER_NAME
    _write_text(pointer, _latest_text(name))
    folders = {folder for file in index.files for folder in PurePosixPath(file).parents}
    for folder in folders:
        sync_directory(temporary / folder)
    final, aside = root / name, root / f".{name}.old"
    replaced = final.exists()
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    try:
        temporary.rename(final)
    except OSError:
        if replaced:
            aside.rename(final)
        raise
    sync_directory(root)
    pointer.replace(root / LATEST_NAME)
    sync_directory(root)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def prune(
    root: Path,
    step: int,
    keep_last: int | None,
    keep_every: int | None,
    damaged: Collection[str] = (),
) -> None:
    """Remove old checkpoints once `step` is published.

    Kept are the newest `keep_last` up to `step`, every multiple of `keep_every`, what `latest`
    names, and steps beyond `step`, which are of a run that was taken back. `keep_last` None
    removes nothing. Step directories named in `damaged` do not count among the newest, as no run
    could go on from them; they go when those of their age go.
    """
    if keep_last is None:
        return
    latest, _ = read_latest(root)
    past = [(at, path) for at, path in step_directories(root).items() if at <= step]
    intact = [at for at, path in past if path.name not in damaged]
    oldest = next(iter(intact[keep_last - 1 :]), 0)
    for at, path in past:
        if at >= oldest or path == latest or (keep_every is not None and at % keep_every == 0):
            continue
        try:
            # Under its new name a removal that is cut short is not taken for a checkpoint.
            doomed = path.rename(root / f".{step_name(at)}.pruned.tmp")
            shutil.rmtree(doomed)
        except OSError as error:
            _LOG.warning("could not remove the old checkpoint %s: %s", path, error)


def newest_published(root: Path) -> tuple[str, int] | None:
    """The name that `latest` holds and the CRC-32 of the index there, which together tell one save
    from any other; None where either cannot be read.
    """
    path, _ = read_latest(root)
    try:
        return None if path is None else (path.name, zlib.crc32((path / INDEX_NAME).read_bytes()))
    except OSError:
        return None
