"""Loading at any layout: the boxes that a rank holds are intersected with the boxes on disk."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.assets import ASSETS_NAME
from core.checkpoint.blocks import CheckedBlocks
from core.checkpoint.directory import newest_complete
from core.checkpoint.index import INDEX_NAME, Index, SavedTensor, TensorRecord, uncovered
from core.checkpoint.plan import box_key
from core.checkpoint.safetensors_io import SafetensorsFile
from core.data_parallel.fragments import row_major_boxes
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
    """One checkpoint, read lazily. Peak memory of a load is the destination and two blocks.

    Every file is read front to back, once a load, and only the blocks (16 MiB) that hold something
    wanted. A block is compared with its checksum before one of its bytes is used: where it lies
    wholly in one contiguous destination, there; else in memory from which it is then copied.

    Raises:
        CheckpointError: the index is damaged, or a file is missing or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = Index.read(path)
        self._blocks = CheckedBlocks(path, self.index)
        self._files: dict[str, SafetensorsFile] = {}

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

        Padding is left as it is. Damage found on the way leaves the tensors filled in part, and
        nothing of the damaged block in them.

        Args:
            tensors: destinations; every element of every copy is filled.
            convert: allow another floating-point dtype than the stored one.

        Raises:
            CheckpointError: a tensor is missing, of another shape or dtype, incomplete or damaged.
        """
        parts: list[_Part] = []
        for saved in tensors:
            record = self._record(saved.name)
            if record.shape != tuple(saved.global_shape):
                raise CheckpointError(
                    f"{self.path}: {saved.name} has shape {record.shape} there and "
                    f"{tuple(saved.global_shape)} here: use the checkpoint's config"
                )
            for copy in saved.copies:
                out = saved.tensor.detach()[copy.local.slices]
                parts += self._parts(saved.name, copy.global_, out, convert)
        self._fill(parts)

    def read_box(self, name: str, box: Box, out: Tensor, *, convert: bool = False) -> None:
        """Copy a box of a global tensor into `out`, which has the box's shape, on any device.

        Raises:
            CheckpointError: as `load`.
            ValueError: `out` has another shape.
        """
        self._fill(self._parts(name, box, out, convert))

    def _record(self, name: str) -> TensorRecord:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        return self.tensors[name]

    def _parts(self, name: str, box: Box, out: Tensor, convert: bool) -> "Iterator[_Part]":
        """What makes up a box of a global tensor."""
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
            inside, place = common.relative_to(stored), out[common.relative_to(box).slices]
            yield _Part(name, record.dtype, stored, file, inside, place)
            left = [rest for part in left for rest in uncovered(part, (common,))]
        if left:
            raise DamagedCheckpointError(f"{self.path} is incomplete: it lacks {left[0]} of {name}")

    @torch.no_grad()
    def _fill(self, parts: "Iterable[_Part]") -> None:
        by_file: dict[str, list[_Part]] = {}
        for part in parts:
            by_file.setdefault(part.file, []).append(part)
        for file in sorted(by_file):
            self._fill_from(file, by_file[file])

    def _fill_from(self, file: str, parts: "Iterable[_Part]") -> None:
        """Fill parts that lie in one file: blocks that hold nothing but bytes of one destination,
        as they lie there, are read into it; from every other, what it holds of the parts is copied.
        """
        size = self.index.block_size
        by_block: dict[int, list[tuple[_Part, int]]] = {}
        into: dict[int, Tensor] = {}
        for part in parts:
            tensors, key = self._find(part.name, part.stored, file)
            first, stop = tensors.span(key, part.inside)
            memory = part.memory(stop - first)
            for number in range(first // size, -(-stop // size)):
                by_block.setdefault(number, []).append((part, tensors.span(key)[0]))
                begin, end = number * size, min((number + 1) * size, self.index.files[file].size)
                if memory is not None and first <= begin and end <= stop:
                    into[number] = memory[begin - first : end - first]
        # A block with several destinations is copied to each of them.
        into = {number: memory for number, memory in into.items() if len(by_block[number]) == 1}

        def use(start: int, block: Tensor) -> None:
            for part, body in by_block[start // size]:
                part.copy_from(block, start - body)

        self._blocks.read(file, sorted(by_block), use, into)

    def _find(self, name: str, stored: Box, file: str) -> tuple[SafetensorsFile, str]:
        """The file that holds a stored box, and its key there."""
        if file not in self._files:
            opened = SafetensorsFile(self.path / file, DamagedCheckpointError)
            self._check(file, opened.body_start)
            self._files[file] = opened
        tensors, key, dtype = self._files[file], box_key(name, stored), self._record(name).dtype
        if key not in tensors or (tensors.shape(key), tensors.dtype(key)) != (stored.shape, dtype):
            raise DamagedCheckpointError(
                f"{tensors.path} does not hold {key} as {dtype} of shape {stored.shape}, as "
                "the index says: the files are of two checkpoints"
            )
        if tensors.span(key)[0] % dtype.itemsize:
            raise DamagedCheckpointError(
                f"{tensors.path} holds {key} at byte {tensors.span(key)[0]}, which is no multiple "
                f"of {dtype.itemsize}: it was not written by this program"
            )
        return tensors, key

    def _check(self, file: str, stop: int) -> None:
        """Compare the first `stop` bytes of a file with their checksums."""
        self._blocks.read(file, range(-(-stop // self.index.block_size)), lambda *_: None)

    def check_assets(self) -> None:
        """Read the assets (`core.checkpoint.assets`) and compare their checksums; those of a
        checkpoint that was written before they had any are not checked.

        Raises:
            DamagedCheckpointError: one is damaged.
        """
        for name, record in self.index.files.items():
            if name.startswith(f"{ASSETS_NAME}/"):
                self._check(name, record.size)

    def verify(self) -> None:
        """Read every file in full: all checksums, all headers, and that no tensor has a hole.

        Raises:
            CheckpointError: the first damage found.
        """
        for file, written in self.index.files.items():
            self._check(file, written.size)
        for name, record in self.tensors.items():
            for stored, file in record.boxes:
                self._find(name, stored, file)
            holes = uncovered(Box.whole(record.shape), (box for box, _ in record.boxes))
            if holes:
                raise DamagedCheckpointError(
                    f"{self.path} is incomplete: it lacks {holes[0]} of {name}"
                )


@dataclass(frozen=True, eq=False)
class _Part:
    """A part of a stored box, and where it goes."""

    name: str
    dtype: torch.dtype
    stored: Box
    file: str
    inside: Box
    """The part, counted from the first index of `stored`."""
    out: Tensor
    """Of the part's shape."""

    def memory(self, span: int) -> Tensor | None:
        """The destination as flat uint8, if the file holds it byte for byte as it lies there.

        Args:
            span: bytes in the file from the part's first element to its last.
        """
        gapless = span == self.inside.numel * self.dtype.itemsize and self.out.is_contiguous()
        if not gapless or self.out.dtype != self.dtype or self.out.device.type != "cpu":
            return None
        return self.out.detach().view(-1).view(torch.uint8)

    def copy_from(self, block: Tensor, offset: int) -> None:
        """Copy what a block holds of the part.

        Args:
            block: flat uint8.
            offset: where it begins, in bytes from the first of `stored`; below 0 if it begins
                before.
        """
        size = self.dtype.itemsize
        skipped = max(0, -offset)
        first = (offset + skipped) // size
        last = min((offset + len(block)) // size, self.stored.numel)
        values = block[skipped : skipped + (last - first) * size].view(self.dtype)
        for run in row_major_boxes(first, last, self.stored.shape):
            rows, values = values[: run.numel].view(run.shape), values[run.numel :]
            common = run.intersect(self.inside)
            if common is not None:
                place = self.out[common.relative_to(self.inside).slices]
                place.copy_(rows[common.relative_to(run).slices])
