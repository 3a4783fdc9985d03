"""The files of a checkpoint, read as blocks that are compared with their checksums."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import MappingProxyType

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from core.checkpoint.index import Index
from core.errors import DamagedCheckpointError

_PIECE = 1 << 20
"""Bytes that are read at a time, and checked while they are in the processor's cache."""

_NOWHERE: Mapping[int, Tensor] = MappingProxyType({})


class CheckedBlocks:
    """Reads blocks of a checkpoint's files and compares them with their checksums where they then
    lie: in memory of its own, or at once where they are wanted, which saves a copy. That memory is
    what is used, so the disk is asked once.

    While a block is used, a thread reads and checks the next one (both release Python's lock). Two
    blocks of memory serve all reads, as fresh memory costs more than the checksum.

    Args:
        directory: the step directory.
        index: of the checkpoint.
    """

    def __init__(self, directory: Path, index: Index) -> None:
        self._directory, self._index = directory, index
        self._ready = torch.empty(index.block_size, dtype=torch.uint8)
        """Memory of the block that was used last; it may be the first of the next read."""
        self._spare = torch.empty_like(self._ready)
        self._last: tuple[str, int] | None = None
        """File and number of that block."""

    def read(
        self,
        name: str,
        numbers: Iterable[int],
        use: Callable[[int, Tensor], object],
        into: Mapping[int, Tensor] = _NOWHERE,
    ) -> None:
        """Hand over blocks of a file, one after another, or put them where they are wanted.

        Args:
            name: of the file, as in the index.
            numbers: of the blocks, each `block_size` bytes of the file.
            use: called with where a block begins in the file, and its bytes (flat uint8), which
                change once it has returned.
            into: by number, memory for whole blocks (flat uint8 on the CPU, as long as the block).
                They are read there and not handed over.

        Raises:
            DamagedCheckpointError: a block is not as it was written, or cannot be read. Neither it
                nor one after it is handed over; memory that it was read into is zero.
        """
        due = list(numbers)
        if due and (name, due[0]) == self._last and due[0] not in into:
            use(*self._view(name, due.pop(0)))
        if not due:
            return
        # One open file for all blocks: while a part of it is checked, the system reads ahead.
        with self._open(name) as file, ThreadPoolExecutor(1, "blocks") as thread:
            coming = thread.submit(self._fetch, name, due[0], into.get(due[0]), file)
            for place, number in enumerate(due, 1):
                coming.result()
                if number not in into:
                    self._ready, self._spare = self._spare, self._ready
                    self._last = (name, number)
                if place < len(due):
                    following = due[place]
                    coming = thread.submit(self._fetch, name, following, into.get(following), file)
                if number not in into:
                    use(*self._view(name, number))

    def _open(self, name: str) -> FileIO:
        with self._readable(name):
            return FileIO(self._directory / name)

    def _view(self, name: str, number: int) -> tuple[int, Tensor]:
        start = number * self._index.block_size
        return start, self._ready[: self._index.files[name].size - start]

    def _fetch(self, name: str, number: int, into: Tensor | None, file: FileIO) -> None:
        """Read a block into the memory given, or the spare one, and compare it."""
        record, size = self._index.files[name], len(self._spare)
        start, stop = number * size, min((number + 1) * size, record.size)
        target = self._spare[: stop - start] if into is None else into
        memory, checksum, intact = target.numpy().data, 0, False
        try:
            with self._readable(name):
                file.seek(start)
                for at in range(0, len(memory), _PIECE):
                    piece = memory[at : at + _PIECE]
                    if file.readinto(piece) != len(piece):
                        break
                    checksum = crc32(piece, checksum)
                else:
                    intact = checksum == record.crc32[number]
        finally:
            if not intact:
                target.zero_()
        if not intact:
            raise DamagedCheckpointError(
                f"{self._directory / name} is damaged: bytes {start} to {stop} do not match their "
                "checksum: restore the file or use another checkpoint"
            )

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DamagedCheckpointError(
                f"{self._directory / name} cannot be read ({error.strerror}): restore the file or "
                "use another checkpoint"
            ) from error
