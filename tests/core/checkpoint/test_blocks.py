import threading
from io import FileIO
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.checkpoint.blocks import CheckedBlocks
from core.checkpoint.index import Index, SavedTensor
from core.checkpoint.writer import write_checkpoint
from core.errors import DamagedCheckpointError
from core.parallel.cutting import whole_copy

BLOCK = 256
FILE = "rank_00000.safetensors"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose file has five blocks, the last of them shorter."""
    monkeypatch.setattr("core.checkpoint.writer.BLOCK_SIZE", BLOCK)
    tensor = SavedTensor("x", (270,), whole_copy((270,)), torch.arange(270.0))
    path = write_checkpoint(tmp_path, 1, [[tensor]], {})
    assert 4 * BLOCK < (path / FILE).stat().st_size < 5 * BLOCK
    return path


class _Counted(CheckedBlocks):
    """Notes which blocks are read from the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Index.read(path))
        self.fetched: list[int] = []
        self.begun = [threading.Event() for _ in range(5)]

    def _fetch(self, name: str, number: int, into: Tensor | None, file: FileIO) -> None:
        self.fetched.append(number)
        self.begun[number].set()
        super()._fetch(name, number, into, file)


def test_blocks_come_in_order_and_the_last_is_kept(path: Path) -> None:
    blocks, data = _Counted(path), (path / FILE).read_bytes()
    seen: list[tuple[int, bytes]] = []

    def use(start: int, block: Tensor) -> None:
        seen.append((start, bytes(block.tolist())))

    blocks.read(FILE, [0, 1, 3], use)
    blocks.read(FILE, [3, 4], use)
    blocks.read(FILE, [4], use)
    blocks.read(FILE, [], use)
    expected = [0, 1, 3, 3, 4, 4]
    assert seen == [(n * BLOCK, data[n * BLOCK : (n + 1) * BLOCK]) for n in expected]
    assert blocks.fetched == [0, 1, 3, 4]


def test_the_next_block_is_read_while_one_is_used(path: Path) -> None:
    blocks = _Counted(path)

    def use(start: int, _: Tensor) -> None:
        following = start // BLOCK + 1
        if following < 4:
            assert blocks.begun[following].wait(timeout=30)

    blocks.read(FILE, range(4), use)


def test_nothing_is_handed_over_from_a_damaged_block_on(path: Path) -> None:
    data = bytearray((path / FILE).read_bytes())
    data[2 * BLOCK + 5] ^= 1
    (path / FILE).write_bytes(data)
    blocks, seen = CheckedBlocks(path, Index.read(path)), list[int]()
    with pytest.raises(DamagedCheckpointError, match="bytes 512 to 768 do not match"):
        blocks.read(FILE, range(5), lambda start, _: seen.append(start))
    assert seen == [0, 256]
    # What came before is still there; the damaged block is not, though it lies in memory.
    blocks.read(FILE, [1], lambda start, _: seen.append(start))
    with pytest.raises(DamagedCheckpointError, match="bytes 512 to 768 do not match"):
        blocks.read(FILE, [2], lambda start, _: seen.append(start))
    assert seen == [0, 256, 256]


def test_blocks_lie_where_they_are_wanted(path: Path) -> None:
    """A short last one too. What is kept is the last block that was handed over."""
    blocks, data = _Counted(path), (path / FILE).read_bytes()
    memory = torch.full((len(data) + 2,), 7, dtype=torch.uint8)
    into = {n: memory[1 + n * BLOCK : -1][:BLOCK] for n in (1, 2, 4)}
    seen: list[tuple[int, bytes]] = []

    def use(start: int, block: Tensor) -> None:
        seen.append((start, bytes(block.tolist())))

    blocks.read(FILE, range(5), use, into)
    assert seen == [(n * BLOCK, data[n * BLOCK : (n + 1) * BLOCK]) for n in (0, 3)]
    around = bytes([7]) * BLOCK
    parts = [data[n * BLOCK : (n + 1) * BLOCK] if n in into else around for n in range(5)]
    assert bytes(memory.tolist()) == b"\x07" + b"".join(parts) + b"\x07"
    blocks.read(FILE, [3], use)
    assert seen[2] == seen[1]
    assert blocks.fetched == [0, 1, 2, 3, 4]
    memory.fill_(7)
    blocks.read(FILE, [3], use, {3: memory[:BLOCK]})
    assert bytes(memory[:BLOCK].tolist()) == data[3 * BLOCK : 4 * BLOCK]
    assert len(seen) == 3


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_nothing_lies_where_a_damaged_block_was_wanted(path: Path, harm: str) -> None:
    blocks, data = _Counted(path), bytearray((path / FILE).read_bytes())
    memory = torch.full((3, BLOCK), 7, dtype=torch.uint8)
    into = {n: memory[n - 1] for n in (1, 2, 3)}
    data[2 * BLOCK + 5] ^= 1
    if harm == "remove":
        (path / FILE).unlink()
    else:
        (path / FILE).write_bytes(data if harm == "flip" else data[: 2 * BLOCK + 9])
    with pytest.raises(DamagedCheckpointError, match=FILE):
        blocks.read(FILE, range(1, 5), lambda *_: None, into)
    if harm == "remove":  # nothing was read
        assert (memory == 7).all()
        return
    assert bytes(memory[0].tolist()) == data[BLOCK : 2 * BLOCK]
    assert not memory[1].any()
    assert (memory[2] == 7).all()


def test_a_damaged_block_is_gone_though_something_else_failed_first(path: Path) -> None:
    data = bytearray((path / FILE).read_bytes())
    data[BLOCK + 5] ^= 1
    (path / FILE).write_bytes(data)
    blocks, memory = _Counted(path), torch.full((BLOCK,), 7, dtype=torch.uint8)

    def use(*_: object) -> None:
        assert blocks.begun[1].wait(timeout=30)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        blocks.read(FILE, range(3), use, {1: memory})
    assert not memory.any()


def test_a_file_that_ends_early_or_is_gone_is_named(path: Path) -> None:
    blocks, data = CheckedBlocks(path, Index.read(path)), (path / FILE).read_bytes()
    (path / FILE).write_bytes(data[:-1])
    with pytest.raises(DamagedCheckpointError, match=rf"bytes 1024 to {len(data)} do not match"):
        blocks.read(FILE, [4], lambda *_: None)
    (path / FILE).unlink()
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read \(No such file"):
        blocks.read(FILE, [0], lambda *_: None)


def test_an_error_of_the_user_comes_through(path: Path) -> None:
    blocks = _Counted(path)

    def use(start: int, _: Tensor) -> None:
        if start:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        blocks.read(FILE, range(5), use)
    assert blocks.fetched == [0, 1, 2]
