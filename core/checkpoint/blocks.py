"""The files of a checkpoint, read as blocks that are compared with their checksums."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import torch
from isal.isal_zlib import crc32
from torch import Tensor

from core.checkpoint.index import Index
from core.errors import DamagedCheckpointError

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
        with ThreadPoolExecutor(1, "blocks") as thread:
            coming = thread.submit(self._fetch, name, due[0], into.get(due[0]))
            for place, number in enumerate(due, 1):
                coming.result()
                if number not in into:
                    self._ready, self._spare = self._spare, self._ready
                    self._last = (name, number)
                if place < len(due):
                    coming = thread.submit(self._fetch, name, due[place], into.get(due[place]))
                if number not in into:
                    use(*self._view(name, number))

    def _view(self, name: str, number: int) -> tuple[int, Tensor]:
        start = number * self._index.block_size
        return start, self._ready[: self._index.files[name].size - start]

    def _fetch(self, name: str, number: int, into: Tensor | None) -> None:
        """Read a block into the memory given, or the spare one, and compare it."""
        path, record, size = self._directory / name, self._index.files[name], len(self._spare)
        start, stop = number * size, min((number + 1) * size, record.size)
        target = self._spare[: stop - start] if into is None else into
        memory, intact = target.numpy().data, False
        try:
            with path.open("rb") as file:
                file.seek(start)
                count = file.readinto(memory)
            intact = count == len(memory) and crc32(memory) == record.crc32[number]
        except OSError as error:
            raise DamagedCheckpointError(
                f"{path} cannot be read ({error.strerror}): restore the file or use another "
                "checkpoint"
            ) from error
        finally:
            if not intact:
                target.zero_()
        if not intact:
            raise DamagedCheckpointError(
                f"{path} is damaged: bytes {start} to {stop} do not match their checksum: "
                "restore the file or use another checkpoint"
            )
