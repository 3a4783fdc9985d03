"""Writing the files of a checkpoint: one per rank that owns boxes, and the assets. Nothing here
communicates.
"""

import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32
from torch import Tensor

from core.checkpoint.assets import ASSETS_NAME, collect_assets
from core.checkpoint.directory import (
    POINTER_NAME,
    publish,
    remove_leftovers,
    step_name,
    sync_file,
)
from core.checkpoint.index import BLOCK_SIZE, FileRecord, Index, SavedTensor, plain_json
from core.checkpoint.plan import OwnedBox, Plan, RankFile, box_key, claim, make_plan
from core.checkpoint.safetensors_io import SafetensorsWriter
from core.parallel.sharding import BoxCopy

Fetch = Callable[[SavedTensor, BoxCopy], Tensor]
"""Gives the data of one box; called once for each box that is written, just before."""


def local_slice(saved: SavedTensor, copy: BoxCopy) -> Tensor:
    """The box as it lies in the local tensor."""
    return saved.tensor[copy.local.slices]


def held_boxes(tensors: Iterable[SavedTensor]) -> dict[OwnedBox, tuple[SavedTensor, BoxCopy]]:
    """Where each box that a rank holds lies."""
    return {(saved.name, copy.global_): (saved, copy) for saved in tensors for copy in saved.copies}


class BlockChecksums:
    """CRC-32 of each block of a stream of bytes, computed by a thread of its own while the bytes
    are written (isal releases Python's lock). A context manager.
    """

    _AHEAD = 2  # pieces that wait for their checksum: they are kept in memory that long

    def __init__(self) -> None:
        self._size = 0
        self._crc32: list[int] = []
        self._worker = ThreadPoolExecutor(1, "checksums")
        self._due: list[Future[None]] = []

    def update(self, data: memoryview) -> None:
        """Take the next bytes, which must not change until `record` has returned."""
        self._due.append(self._worker.submit(self._add, data))
        if len(self._due) > self._AHEAD:
            self._due.pop(0).result()

    def record(self) -> FileRecord:
        """Size and checksums of all bytes so far."""
        while self._due:
            self._due.pop(0).result()
        return FileRecord(self._size, tuple(self._crc32))

    def _add(self, data: memoryview) -> None:
        while data:
            at = self._size % BLOCK_SIZE
            part, data = data[: BLOCK_SIZE - at], data[BLOCK_SIZE - at :]
            if at == 0:
                self._crc32.append(0)
            self._crc32[-1] = crc32(part, self._crc32[-1])
            self._size += len(part)

    def __enter__(self) -> "BlockChecksums":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(cancel_futures=True)


def write_rank_file(
    directory: Path,
    file: RankFile,
    source: Iterable[SavedTensor] | Tensor,
    fetch: Fetch = local_slice,
) -> dict[str, FileRecord]:
    """Write and flush the file of one rank.

    Args:
        directory: where to.
        file: what is in it.
        source: the tensors that the rank holds, of which one box at a time is brought to the host;
            or the bytes of all boxes as they lie in the file, a flat uint8 tensor.
        fetch: supplies each box of the tensors.

    Returns:
        The file's name and record; nothing for a rank that writes no box.

    Raises:
        OSError: the file cannot be written; it is then removed.
    """
    if not file.boxes:
        return {}
    with BlockChecksums() as checksums:
        path = directory / file.name
        with SafetensorsWriter(path, file.entries, on_bytes=checksums.update) as writer:
            if isinstance(source, Tensor):
                writer.write_bodies(source)
            else:
                where = held_boxes(source)
                for name, box in file.boxes:
                    writer.write(box_key(name, box), fetch(*where[name, box]))
        return {file.name: checksums.record()}


def write_assets(source: Path, directory: Path) -> dict[str, FileRecord]:
    """Copy the assets of a folder (`core.checkpoint.assets`) into `hf/` of a checkpoint, flushed.

    Returns:
        Their names relative to the checkpoint, and records.

    Raises:
        OSError: a file cannot be read or written.
    """
    records = {}
    for name in collect_assets(source):
        target = directory / ASSETS_NAME / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            BlockChecksums() as checksums,
            (source / name).open("rb") as read,
            target.open("wb") as write,
        ):
            while data := read.read(BLOCK_SIZE):
                checksums.update(memoryview(data))
                write.write(data)
            sync_file(write)
            records[f"{ASSETS_NAME}/{name}"] = checksums.record()
    return records


def remove_attempt(root: Path, temporary: Path) -> None:
    """Remove what a save that failed has written."""
    shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):  # the failure that led here is the one to report
        (root / POINTER_NAME).unlink()


def write_checkpoint(
    root: Path,
    step: int,
    shards: Sequence[Sequence[SavedTensor]],
    sections: Any,
    fetch: Fetch = local_slice,
    *,
    assets: Path | None = None,
) -> Path:
    """Save the files of several ranks from one process, as a conversion does. No communication.

    Args:
        root: the save directory.
        step: the step to save as.
        shards: for every rank to be, what it would hold; tensors may be on the meta device.
        sections: JSON to remember.
        fetch: supplies each box when its turn comes, so that only one is in memory.
        assets: folder of small files that belong to the weights, to be part of the checkpoint.

    Returns:
        The step directory.

    Raises:
        CheckpointError: the shards do not make up whole tensors.
        OSError: the disk is full, or the directory cannot be written; nothing is left.
    """
    sections = plain_json(sections)
    remove_leftovers(root)
    plan: Plan = make_plan([claim(tensors) for tensors in shards])
    temporary = root / f".{step_name(step)}.{uuid.uuid4().hex[:8]}.tmp"
    files: dict[str, FileRecord] = {}
    try:
        temporary.mkdir(parents=True)
        for file, tensors in zip(plan.files, shards, strict=True):
            files |= write_rank_file(temporary, file, tensors, fetch)
        if assets is not None:
            files |= write_assets(assets, temporary)
        return publish(root, temporary, Index(step, plan.tensors, files, sections, BLOCK_SIZE))
    except BaseException:
        remove_attempt(root, temporary)
        raise
