"""Arrays kept on disk from run to run, built by whichever process comes first.

No process group takes part: a long build can never run into a collective's time limit. Processes
that share a directory queue on a file lock; where the file system has none, several build the same
bytes, and each renames its own files into place.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from core.data.samples import Array
from core.errors import DataError

Layout = Mapping[str, tuple[np.dtype[np.generic], tuple[int | None, ...]]]
"""Key to dtype and shape; a size that is not known before the array is built is None."""


def cached_arrays(
    directory: Path,
    name: str,
    identifiers: Mapping[str, object],
    layout: Layout,
    build: Callable[[], Mapping[str, Array]],
) -> dict[str, Array]:
    """Map arrays from the cache; build and store them first if they are absent or damaged.

    Files are named as Megatron-LM's: `MD5-NAME-KEY.npy` and `MD5-NAME-description.txt`, where MD5
    is that of the identifiers' JSON.

    Args:
        directory: of the cache; made if need be.
        name: class and split of the data set.
        identifiers: all that the arrays follow from.
        layout: key -> dtype and shape that a stored array must have.
        build: makes the arrays.

    Raises:
        DataError: the directory cannot be written to.
    """
    description = json.dumps(identifiers, indent=4)
    digest = hashlib.md5(description.encode(), usedforsecurity=False).hexdigest()
    stem = f"{digest}-{name}"
    arrays = _load(directory, stem, layout)
    if arrays is not None:
        return arrays
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory / f"{stem}.lock"):
            arrays = _load(directory, stem, layout)  # another process may have been first
            if arrays is not None:
                return arrays
            built = build()
            for key, array in built.items():
                with _written_aside(directory / f"{stem}-{key}.npy") as file:
                    np.save(file, array, allow_pickle=False)
            with _written_aside(directory / f"{stem}-description.txt") as file:
                file.write(description.encode())
    except OSError as error:
        raise DataError(
            f"cannot keep prepared data in {directory} ({error.strerror or error}): name a "
            "directory with room and write access with --data.cache-dir"
        ) from error
    # Mapped rather than kept, so that the processes of a node share the memory.
    return _load(directory, stem, layout) or dict(built)


def _load(directory: Path, stem: str, layout: Layout) -> dict[str, Array] | None:
    if not (directory / f"{stem}-description.txt").is_file():
        return None
    arrays: dict[str, Array] = {}
    for key, (dtype, shape) in layout.items():
        try:
            array = np.load(directory / f"{stem}-{key}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None  # absent or damaged: it is built anew
        sizes = zip(shape, array.shape, strict=True)
        fits = array.ndim == len(shape) and all(want in (None, size) for want, size in sizes)
        if array.dtype != dtype or not fits:
            return None
        arrays[key] = array
    return arrays


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # no locks on this file system: see the module
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file, or the end of the process, gives the lock back


@contextlib.contextmanager
def _written_aside(path: Path) -> Iterator[IO[bytes]]:
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with aside.open("wb") as file:
            yield file
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
