"""Loading at any layout: the boxes that a rank holds are intersected with the boxes on disk."""

import zlib
from collections.abc import Iterable, Mapping
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.assets import ASSETS_NAME
from core.checkpoint.directory import newest_complete
from core.checkpoint.index import (
    INDEX_NAME,
    FileRecord,
    Index,
    SavedTensor,
    TensorRecord,
    uncovered,
)
from core.checkpoint.plan import box_key
from core.checkpoint.safetensors_io import SafetensorsFile
from core.errors import CheckpointError, DamagedCheckpointError
from core.parallel.sharding import Box


def open_checkpoint(path: Path) -> "CheckpointReader":
    """Open a step directory, or the newest complete one under a save directory.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (path / INDEX_NAME).is_file():
        return CheckpointReader(path)
    found = newest_complete(path)
    if found is None:
        raise no_checkpoint(path)
    return CheckpointReader(found)


def no_checkpoint(path: Path) -> CheckpointError:
    """The error for a path that is neither a step directory nor a folder of some."""
    if not path.is_dir():
        return CheckpointError(f"checkpoint {path} is not a directory: check the path")
    return CheckpointError(
        f"{path} holds no checkpoint: neither {INDEX_NAME} nor a step directory is in it"
    )


class CheckpointReader:
    """One checkpoint, read lazily. Peak memory of a load is the destination and one slice.

    Every block of a file (16 MiB) is compared with its checksum before the first use of one of its
    bytes, and once only, so a rank that needs part of a file reads about that part.

    Raises:
        CheckpointError: the index is damaged, or a file is missing or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path)
        self._files: dict[str, _TensorFile] = {}
        self._buffer = memoryview(bytearray(self.index.block_size))

    @property
    def step(self) -> int:
        """The training step it was saved at."""
        return self.index.step

    @property
    def sections(self) -> Mapping[str, Any]:
        """The JSON that the caller saved."""
        return self.index.sections

    @property
    def tensors(self) -> Mapping[str, TensorRecord]:
        """Global shape, dtype and boxes of every tensor."""
        return self.index.tensors

    def load(self, tensors: Iterable[SavedTensor], *, convert: bool = False) -> None:
        """Fill local tensors at whatever layout they have. No communication.

        Padding is left as it is. An error may leave some tensors filled and others not.

        Args:
            tensors: destinations; every element of every copy is filled.
            convert: allow another floating-point dtype than the stored one.

        Raises:
            CheckpointError: a tensor is missing, of another shape or dtype, incomplete or damaged.
        """
        for saved in tensors:
            record = self._record(saved.name)
            if record.shape != tuple(saved.global_shape):
                raise CheckpointError(
                    f"{self.path}: {saved.name} has shape {record.shape} there and "
                    f"{tuple(saved.global_shape)} here: use the checkpoint's config"
                )
            for copy in saved.copies:
                out = saved.tensor.detach()[copy.local.slices]
                self.read_box(saved.name, copy.global_, out, convert=convert)

    def _record(self, name: str) -> TensorRecord:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.tensors[name]

    @torch.no_grad()
    def read_box(self, name: str, box: Box, out: Tensor, *, convert: bool = False) -> None:
        """Copy a box of a global tensor into `out`, which has the box's shape, on any device.

        Raises:
            CheckpointError: as `load`.
            ValueError: `out` has another shape.
        """
        record = self._record(name)
        if tuple(out.shape) != box.shape:
            raise ValueError(f"{name}: {box} does not fit a tensor of shape {tuple(out.shape)}")
        if out.dtype != record.dtype and not (
            convert and out.dtype.is_floating_point and record.dtype.is_floating_point
        ):
            raise CheckpointError(
                f"{self.path}: {name} is {record.dtype} there and {out.dtype} here: load into the "
                "same precision, or ask for conversion"
            )
        left = uncovered(box, ())
        for stored, file in record.boxes:
            common = stored.intersect(box)
            if common is None or all(part.intersect(common) is None for part in left):
                continue
            source = self._file(file).read(box_key(name, stored), stored, record.dtype, common)
            out[common.relative_to(box).slices].copy_(source)
            left = [rest for part in left for rest in uncovered(part, (common,))]
        if left:
            raise DamagedCheckpointError(f"{self.path} is incomplete: it lacks {left[0]} of {name}")

    def _file(self, name: str) -> "_TensorFile":
        if name not in self._files:
            self._files[name] = _TensorFile(self._blocks(name))
        return self._files[name]

    def _blocks(self, name: str) -> "_CheckedBlocks":
        return _CheckedBlocks(self.path / name, self.index.files[name], self._buffer)

    def check_assets(self) -> None:
        """Read the assets (`core.checkpoint.assets`) and compare their checksums; those of a
        checkpoint that was written before they had any are not checked.

        Raises:
            DamagedCheckpointError: one is damaged.
        """
        for name, record in self.index.files.items():
            if name.startswith(f"{ASSETS_NAME}/"):
                self._blocks(name).check(0, record.size)

    def verify(self) -> None:
        """Read every file in full: all checksums, all headers, and that no tensor has a hole.

        Raises:
            CheckpointError: the first damage found.
        """
        self.check_assets()
        for name in {file for record in self.tensors.values() for _, file in record.boxes}:
            self._file(name).blocks.check(0, self.index.files[name].size)
        for name, record in self.tensors.items():
            for stored, file in record.boxes:
                self._file(file).read(box_key(name, stored), stored, record.dtype, stored)
            holes = uncovered(Box.whole(record.shape), (box for box, _ in record.boxes))
            if holes:
                raise DamagedCheckpointError(
                    f"{self.path} is incomplete: it lacks {holes[0]} of {name}"
                )


class _CheckedBlocks:
    """The blocks of a file, each of which is compared with its checksum once."""

    def __init__(self, path: Path, record: FileRecord, buffer: memoryview) -> None:
        """`buffer` is memory of one block's size."""
        self.path, self._record = path, record
        self._buffer, self._block_size = buffer, len(buffer)
        self._checked = [False] * len(record.crc32)

    def check(self, start: int, stop: int) -> None:
        """Compare the blocks of a byte range with their checksums."""
        size = self._block_size
        due = [
            block for block in range(start // size, -(-stop // size)) if not self._checked[block]
        ]
        if not due:
            return
        try:
            with self.path.open("rb", buffering=0) as file:
                for block in due:
                    self._check(file, block)
        except OSError as error:
            raise DamagedCheckpointError(
                f"{self.path} cannot be read ({error.strerror}): restore the file or use another "
                "checkpoint"
            ) from error

    def _check(self, file: RawIOBase, block: int) -> None:
        size = self._block_size
        file.seek(block * size)
        # Into the same memory every time: fresh memory costs more than the checksum.
        count = file.readinto(self._buffer)
        if zlib.crc32(self._buffer[:count]) != self._record.crc32[block]:
            raise DamagedCheckpointError(
                f"{self.path} is damaged: bytes {block * size} to "
                f"{min((block + 1) * size, self._record.size)} do not match their checksum: "
                "restore the file or use another checkpoint"
            )
        self._checked[block] = True


class _TensorFile:
    """A safetensors file whose blocks are checked before they are used."""

    def __init__(self, blocks: _CheckedBlocks) -> None:
        self.blocks = blocks
        self._tensors = SafetensorsFile(blocks.path, DamagedCheckpointError)
        blocks.check(0, self._tensors.body_start)

    def read(self, key: str, stored: Box, dtype: torch.dtype, part: Box) -> Tensor:
        """A view of the file for `part` of the box `stored`; both are boxes of the global
        tensor.
        """
        tensors = self._tensors
        if key not in tensors or (tensors.shape(key), tensors.dtype(key)) != (stored.shape, dtype):
            raise DamagedCheckpointError(
                f"{self.blocks.path} does not hold {key} as {dtype} of shape {stored.shape}, as "
                "the index says: the files are of two checkpoints"
            )
        inside = part.relative_to(stored)
        self.blocks.check(*tensors.span(key, inside))
        return tensors.read(key, inside)
