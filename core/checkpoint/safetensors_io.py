"""Safetensors files, streamed: written header first and then body by body, read by lazy slices.

The format (huggingface/safetensors): eight bytes with the length of a JSON header, the header with
dtype, shape and byte range of every tensor, then the bodies in row-major order, little-endian. The
`safetensors` package reads and validates; its own writer needs all tensors in memory at once, so
writing is done here.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import CheckpointError, TesseraError
from core.parallel.sharding import Box

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "C64": torch.complex64,
    }
)
"""Name in a header to torch dtype."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({d: name for name, d in DTYPES.items()})

_MAX_HEADER = 100_000_000  # the limit of the safetensors package
_PIECE = 16 << 20
_FLUSH = 128 << 20  # bytes between flushes


class SafetensorsWriter:
    """Writes one safetensors file front to back; its size is known before the first tensor.

    A context manager: leaving it flushes the file to the disk, an exception removes the file. Only
    the piece of a tensor being written (16 MiB, or one row if that is more) is copied to the CPU.

    Args:
        path: the file, which must not exist.
        entries: key to (dtype, shape), in the order in which they will be written. Bodies are
            aligned if item sizes fall along that order; readers do not require it.
        metadata: text fields of the header.
        on_bytes: called with every run of bytes of the file, in order; for checksums.

    Raises:
        OSError: the file cannot be made or written (from every method).
        ValueError: a dtype that safetensors does not have.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        on_bytes: Callable[[memoryview], object] | None = None,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        self._pending: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        for key, (dtype, shape) in entries.items():
            if dtype not in DTYPE_NAMES:
                raise ValueError(f"{path}: tensor {key} has dtype {dtype}, unknown to safetensors")
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [start, end],
            }
            self._pending.append((key, dtype, tuple(shape)))
        self._pending.reverse()
        self._left = 0
        """Bytes still to come of the tensor being written."""
        self._current: tuple[str, torch.dtype, tuple[int, ...]] = ("", torch.uint8, (0,))
        self._path, self._on_bytes, self._unflushed = path, on_bytes, 0
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _MAX_HEADER:
            raise ValueError(f"{path}: a header of {len(text)} bytes is too long for safetensors")
        self._file = path.open("xb")
        try:
            self._put(memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self._discard()
            raise

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        if self._on_bytes is not None:
            self._on_bytes(data)
        self._unflushed += len(data)
        if self._unflushed >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        """Put on the disk what was written, and out of the page cache: a checkpoint would take much
        memory there, whose first use is slower than the disk, and push out what training reads.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._unflushed = 0

    def write(self, key: str, tensor: Tensor) -> None:
        """Write the next tensor, or its next rows; any device, any strides.

        Args:
            key: as in `entries`, and in that order.
            tensor: the whole tensor, or consecutive rows (indices of dim 0) of it.

        Raises:
            ValueError: another tensor is due, or dtype, row shape or number of rows do not fit the
                header.
        """
        while not self._left and self._pending and self._current[0] != key:
            self._current = self._pending.pop()
            self._left = math.prod(self._current[2]) * self._current[1].itemsize
        due, dtype, shape = self._current
        given = (tensor.dtype, tuple(tensor.shape[1:]), tensor.dim())
        size = tensor.numel() * tensor.element_size()
        if key != due or given != (dtype, shape[1:], len(shape)) or size > self._left:
            raise ValueError(
                f"{self._path}: got {key} {tensor.dtype} {tuple(tensor.shape)} where {self._left} "
                f"bytes of {due} {dtype} {shape} are due"
            )
        for piece in _pieces(tensor):
            self._put(piece)
        self._left -= size

    def write_bodies(self, bodies: Tensor) -> None:
        """Write all tensors at once, in few large pieces.

        Args:
            bodies: flat uint8 on the CPU, the tensors as they follow each other in the file.

        Raises:
            ValueError: something was written before, or the size is not the header's.
        """
        due = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self._pending)
        if self._current[0] or bodies.dtype != torch.uint8 or bodies.shape != (due,):
            raise ValueError(
                f"{self._path}: got {bodies.dtype} {tuple(bodies.shape)} where {due} bytes are due"
            )
        for piece in _pieces(bodies):
            self._put(piece)
        self._pending.clear()

    def _discard(self) -> None:
        try:
            self._file.close()
        finally:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            missing = [key for key, _, shape in reversed(self._pending) if math.prod(shape)]
            if self._left or missing:
                first = self._current[0] if self._left else missing[0]
                raise ValueError(f"{self._path}: tensor {first} was not written to its end")
            self._flush()
            self._file.close()
        except BaseException:
            self._discard()
            raise


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, a bounded copy at a time."""
    tensor = tensor.detach()
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    if tensor.numel() == 0:
        return
    rows = max(1, _PIECE // (tensor[0].numel() * tensor.element_size()))
    for at in range(0, tensor.shape[0], rows):
        piece = tensor[at : at + rows].cpu().contiguous().reshape(-1).view(torch.uint8)
        yield piece.numpy().data


class SafetensorsFile:
    """A safetensors file read by lazy slices: no byte is touched before a slice is copied.

    Args:
        path: the file.
        error: class of the errors raised, so that a conversion raises `ConversionError`.

    Raises:
        TesseraError: (of class `error`) absent, truncated, not safetensors, a key given twice,
            byte ranges that overlap, leave holes or leave the file.
    """

    def __init__(self, path: Path, error: type[TesseraError] = CheckpointError) -> None:
        self.path, self._error = path, error
        try:
            header, self.body_start = self._read_header()
            self._reader: Any = safe_open(str(path), framework="pt", device="cpu")
        except FileNotFoundError:
            raise error(f"{path} does not exist: restore or download it again") from None
        except (SafetensorError, OSError, ValueError) as reason:
            raise error(
                f"{path} is damaged or not a safetensors file ({reason}): restore or download it "
                "again"
            ) from None
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        self._entries = header

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """Header and offset of the first body. Only what the package does not say is checked here:
        sizes in a truncated file, and keys given twice.
        """

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):
                keys = [key for key, _ in pairs]
                raise ValueError(f"{next(k for k in keys if keys.count(k) > 1)!r} stands twice")
            return found

        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ValueError(f"its {size} bytes cannot hold a header of {length}")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        try:
            ends = [entry["data_offsets"][1] for k, entry in header.items() if k != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (AttributeError, LookupError, TypeError):
            raise ValueError("its header is not one of safetensors") from None
        if size != expected:
            raise ValueError(f"it has {size} bytes where its header describes {expected}")
        return header, 8 + length

    def keys(self) -> list[str]:
        """All keys, in the order of the header."""
        return list(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def _entry(self, key: str) -> dict[str, Any]:
        if key not in self._entries:
            raise self._error(f"{self.path} has no tensor {key}")
        found: dict[str, Any] = self._entries[key]
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._entry(key)["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor.

        Raises:
            TesseraError: (of class `error`) torch has no such dtype, or there is no such tensor.
        """
        name = self._entry(key)["dtype"]
        if name not in DTYPES:
            raise self._error(f"{self.path}: tensor {key} has dtype {name}, which is not supported")
        return DTYPES[name]

    def span(self, key: str, box: Box | None = None) -> tuple[int, int]:
        """Byte range in the file from the first to the last element of a box (default: all)."""
        shape = self.shape(key)
        start, stop = self._entry(key)["data_offsets"]
        if box is not None and box.numel:
            first = last = 0
            for a, n, size in zip(box.start, box.shape, shape, strict=True):
                first, last = first * size + a, last * size + a + n - 1
            item = self.dtype(key).itemsize
            start, stop = start + first * item, start + (last + 1) * item
        return self.body_start + start, self.body_start + stop

    def read(self, key: str, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it, as a CPU view of the memory-mapped file.

        Copy it into its destination and let it go: a kept view keeps the file mapped, and
        `torch.save` of one would store the whole file. Copying rows touches their bytes only;
        copying columns reads all rows through the page cache, but takes no anonymous memory.
        """
        shape = self.shape(key)
        self.dtype(key)
        if box is None or not shape:
            found: Tensor = self._reader.get_tensor(key)
            return found
        if box.intersect(Box.whole(shape)) != box and box.numel:
            raise self._error(f"{self.path}: {box} leaves tensor {key} of shape {shape}")
        found = self._reader.get_slice(key)[box.slices]
        return found
