import dataclasses
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint.blocks import CheckedBlocks
from core.checkpoint.index import BLOCK_SIZE, FileRecord, Index, SavedTensor
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.safetensors_io import SafetensorsWriter
from core.checkpoint.writer import write_checkpoint
from core.errors import CheckpointError
from core.parallel.cutting import whole_copy
from core.parallel.sharding import Box, BoxCopy

Shards = list[list[SavedTensor]]
MakeShards = Callable[..., Shards]
Differences = Callable[[Shards, Shards], list[str]]


@pytest.mark.parametrize("target", [1, 2, 4])
@pytest.mark.parametrize("source", [1, 2, 4])
def test_any_layout_loads_at_any_layout(
    tmp_path: Path, make_shards: MakeShards, differences: Differences, source: int, target: int
) -> None:
    write_checkpoint(tmp_path, 3, make_shards(source), {})
    reader = open_checkpoint(tmp_path)
    assert len(reader.index.files) == source
    empty, expected = make_shards(target, empty=True), make_shards(target)
    assert len(differences(empty, expected)) >= 10 * target
    for shard in empty:
        reader.load(shard)
    assert differences(empty, expected) == []
    reader.verify()


def _random_partition(rng: random.Random, box: Box, depth: int) -> list[Box]:
    cuts = [dim for dim, size in enumerate(box.shape) if size > 1]
    if depth == 0 or not cuts:
        return [box]
    dim = rng.choice(cuts)
    at = rng.randint(1, box.shape[dim] - 1)
    start, shape = list(box.start), list(box.shape)
    shape[dim] = at
    low = Box(tuple(start), tuple(shape))
    start[dim], shape[dim] = start[dim] + at, box.shape[dim] - at
    return [
        part
        for half in (low, Box(tuple(start), tuple(shape)))
        for part in _random_partition(rng, half, depth - 1)
    ]


@pytest.mark.parametrize("block_size", [16, 48, BLOCK_SIZE])
@pytest.mark.parametrize("seed", range(12))
def test_random_boxes_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, block_size: int
) -> None:
    """Random tilings, spread over ranks with some tiles on several; then random boxes are read."""
    monkeypatch.setattr("core.checkpoint.writer.BLOCK_SIZE", block_size)
    rng = random.Random(seed)
    dtype = rng.choice([torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
    whole = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    world = rng.randint(1, 4)
    held: list[list[Box]] = [[] for _ in range(world)]
    for box in _random_partition(rng, Box.whole(shape), 4):
        for rank in rng.sample(range(world), rng.randint(1, world)):
            held[rank].append(box)
    # The local tensor is as large as the whole, so that each box lies where it does globally.
    shards = [
        [SavedTensor("x", shape, tuple(BoxCopy(b, b) for b in boxes), whole)] for boxes in held
    ]
    write_checkpoint(tmp_path, 1, shards, {})
    reader = open_checkpoint(tmp_path)
    for _ in range(20):
        start = tuple(rng.randrange(n) for n in shape)
        box = Box(start, tuple(rng.randint(1, n - a) for a, n in zip(start, shape, strict=True)))
        out = torch.zeros(box.shape, dtype=dtype)
        reader.read_box("x", box, out)
        assert torch.equal(out, whole[box.slices])


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Blocks of 256 bytes, and those that were read from the disk."""
    monkeypatch.setattr("core.checkpoint.writer.BLOCK_SIZE", 256)
    found: list[tuple[str, int]] = []
    fetch = CheckedBlocks._fetch

    def noted(self: CheckedBlocks, name: str, number: int, *where: Any) -> None:
        found.append((name, number))
        fetch(self, name, number, *where)

    monkeypatch.setattr(CheckedBlocks, "_fetch", noted)
    return found


def _whole(name: str, tensor: Tensor) -> SavedTensor:
    shape = tuple(tensor.shape)
    return SavedTensor(name, shape, whole_copy(shape), tensor)


@pytest.mark.parametrize("target", [1, 2, 4])
def test_a_load_reads_every_block_once(
    tmp_path: Path,
    make_shards: MakeShards,
    differences: Differences,
    fetched: list[tuple[str, int]],
    target: int,
) -> None:
    """Many tensors to a block and many blocks to a tensor, rows and columns of them."""
    reader = open_checkpoint(write_checkpoint(tmp_path, 1, make_shards(2), {}))
    every = [(n, b) for n, f in sorted(reader.index.files.items()) for b in range(len(f.crc32))]
    assert len(every) > 20
    empty = make_shards(target, empty=True)
    for shard in empty:
        rng = random.Random(0)
        rng.shuffle(shard)
        fetched.clear()
        reader = open_checkpoint(tmp_path)
        reader.load(shard)
        assert len(set(fetched)) == len(fetched)
        assert fetched == [block for block in every if block in fetched]
        assert target > 1 or fetched == every
    expected = make_shards(target)
    for shard, other in zip(empty, expected, strict=True):
        shard.sort(key=lambda saved: saved.name)
        other.sort(key=lambda saved: saved.name)
    assert differences(empty, expected) == []
    fetched.clear()
    reader.verify()
    assert set(fetched) == set(every)


def test_a_part_reads_about_that_part(tmp_path: Path, fetched: list[tuple[str, int]]) -> None:
    """Rows read their bytes, columns all rows; a converted tensor is read like any other."""
    whole = torch.randn(64, 48, dtype=torch.float64)
    reader = open_checkpoint(write_checkpoint(tmp_path, 1, [[_whole("x", whole)]], {}))
    row, header = 48 * 8, 1
    for box, most in (
        (Box((30, 0), (2, 48)), 2 * row // 256 + 2),
        (Box((30, 40), (4, 8)), 4 * row // 256 + 2),
        (Box((0, 40), (64, 8)), 64 * row // 256 + 1),
    ):
        for dtype in (torch.float64, torch.bfloat16):
            fetched.clear()
            out = torch.empty(box.shape, dtype=dtype)
            reader.read_box("x", box, out, convert=True)
            assert torch.equal(out, whole[box.slices].to(dtype))
            assert len(fetched) <= most + header


def test_a_strided_destination_gets_its_columns(
    tmp_path: Path, fetched: list[tuple[str, int]]
) -> None:
    whole = torch.arange(40 * 7 * 3.0).reshape(40, 7, 3)
    reader = open_checkpoint(write_checkpoint(tmp_path, 1, [[_whole("x", whole)]], {}))
    memory = torch.full((3, 20, 40), -1.0)
    out = memory.permute(2, 1, 0)[:, 5:9]  # of shape [40, 4, 3]
    reader.read_box("x", Box((0, 2, 0), (40, 4, 3)), out)
    assert torch.equal(out, whole[:, 2:6])
    assert (memory == -1).sum() == memory.numel() - out.numel()


def test_damage_in_one_block_is_found_and_nothing_of_it_is_used(
    tmp_path: Path, fetched: list[tuple[str, int]]
) -> None:
    values = torch.arange(1.0, 1025.0)
    path = write_checkpoint(tmp_path, 1, [[_whole("x", values), _whole("y", values)]], {})
    file = path / "rank_00000.safetensors"
    intact = file.read_bytes()
    body = len(intact) - 2 * 4096
    for block in range(-(-len(intact) // 256)):
        data = bytearray(intact)
        data[min(block * 256 + 100, len(data) - 1)] ^= 1
        file.write_bytes(data)
        out = torch.zeros(2, 1024)
        reader = open_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
            reader.load([_whole("y", out[1]), _whole("x", out[0])])
        filled = max(0, block * 256 - body) // 4
        assert torch.equal(out.view(-1)[:filled], values.repeat(2)[:filled])
        assert not out.view(-1)[filled:].any()
        # The parts that lie elsewhere can be had.
        if block * 256 >= body + 4096:
            reader.load([_whole("x", out[0])])
            assert torch.equal(out[0], values)


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of 256 bytes, and the numbers of those that were read into a destination."""
    monkeypatch.setattr("core.checkpoint.writer.BLOCK_SIZE", 256)
    found: list[int] = []
    fetch = CheckedBlocks._fetch

    def noted(self: CheckedBlocks, name: str, number: int, *where: Any) -> None:
        if where[0] is not None:
            found.append(number)
        fetch(self, name, number, *where)

    monkeypatch.setattr(CheckedBlocks, "_fetch", noted)
    return found


def test_whole_blocks_of_a_destination_are_read_into_it(tmp_path: Path, placed: list[int]) -> None:
    """Not those that hold more than is wanted there, nor what lies there in another way."""
    values = torch.randn(64, 48)
    tensors = [_whole("x", values), _whole("y", values + 1), _whole("half", values.bfloat16())]
    path = write_checkpoint(tmp_path, 1, [tensors], {})
    reader, size = open_checkpoint(path), (path / "rank_00000.safetensors").stat().st_size
    half, y, x = size - 64 * 48 * 2, size - 64 * 48 * 6, size - 64 * 48 * 10

    def inside(start: int, stop: int) -> list[int]:
        last = -(-size // 256) if stop == size else stop // 256
        return list(range(-(-start // 256), last))

    whole, rows = Box.whole((64, 48)), Box((7, 0), (30, 48))
    row = 48 * 4
    for name, box, out, expected in (
        ("x", whole, torch.empty(64, 48), inside(x, y)),
        ("half", whole, torch.empty(64, 48, dtype=torch.bfloat16), inside(half, size)),
        ("y", rows, torch.empty(64, 48)[3:33], inside(y + 7 * row, y + 37 * row)),
        ("y", rows, torch.nn.Parameter(torch.empty(30, 48)), inside(y + 7 * row, y + 37 * row)),
        ("y", rows, torch.empty(30, 96)[:, ::2], []),
        ("y", whole, torch.empty(48, 64).t(), []),
        ("y", whole, torch.empty(64, 48, dtype=torch.float64), []),
        ("y", Box((0, 0), (64, 47)), torch.empty(64, 47), []),
    ):
        placed.clear()
        reader.read_box(name, box, out, convert=True)
        assert placed == expected
        stored = {"x": values, "y": values + 1, "half": values.bfloat16()}[name]
        assert torch.equal(out, stored[box.slices].to(out.dtype))
    assert inside(x, y)
    assert inside(y + 7 * row, y + 37 * row)


def test_a_block_with_two_destinations_gets_to_both(tmp_path: Path, placed: list[int]) -> None:
    values = torch.randn(1024)
    reader = open_checkpoint(write_checkpoint(tmp_path, 1, [[_whole("x", values)]], {}))
    outs = torch.empty(3, 1024)
    reader.load([_whole("x", outs[0]), _whole("x", outs[1])])
    assert placed == []
    reader.load([_whole("x", outs[2])])
    assert len(placed) == 16
    assert torch.equal(outs, values.expand(3, -1))


def test_a_damaged_block_is_not_left_in_its_destination(tmp_path: Path, placed: list[int]) -> None:
    values = torch.arange(1.0, 1025.0)
    path = write_checkpoint(tmp_path, 1, [[_whole("x", values)]], {})
    file = path / "rank_00000.safetensors"
    data, body = bytearray(file.read_bytes()), file.stat().st_size - 4096
    data[5 * 256 + 100] ^= 1
    file.write_bytes(data)
    out = torch.full((1024,), -1.0)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged: bytes 1280 to"):
        open_checkpoint(path).load([_whole("x", out)])
    assert placed[-1] == 5
    first, stop = (5 * 256 - body) // 4, (6 * 256 - body) // 4
    assert torch.equal(out[:first], values[:first])
    assert not out[first:stop].any()
    assert (out[stop:] == -1).all()


def test_numbers_that_lie_in_two_blocks_are_refused(tmp_path: Path) -> None:
    tensors = {"odd@0": torch.ones(3, dtype=torch.int8), "x@0": torch.ones(2)}
    local = [_whole(key[:-2], tensor) for key, tensor in tensors.items()]
    path = write_checkpoint(tmp_path, 1, [local], {})
    file, index = path / "rank_00000.safetensors", Index.read(path)
    file.unlink()
    with SafetensorsWriter(file, {k: (t.dtype, t.shape) for k, t in tensors.items()}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    data = file.read_bytes()
    files = {file.name: FileRecord(len(data), (zlib.crc32(data),))}
    (path / "index.json").write_text(dataclasses.replace(index, files=files).dump())
    reader = open_checkpoint(path)
    reader.load([_whole("odd", torch.empty(3, dtype=torch.int8))])
    with pytest.raises(CheckpointError, match=r"holds x@0 at byte \d+, which is no multiple of 4"):
        reader.load([_whole("x", torch.empty(2))])


@pytest.fixture
def saved(tmp_path: Path, make_shards: MakeShards) -> Path:
    return write_checkpoint(tmp_path, 3, make_shards(2), {"config": {}})


def _load(path: Path, shards: Shards) -> None:
    reader = open_checkpoint(path)
    for shard in shards:
        reader.load(shard)


def test_every_flipped_byte_is_noticed(saved: Path, make_shards: MakeShards) -> None:
    rng = random.Random(0)
    for file in sorted(saved.iterdir()):
        data = file.read_bytes()
        for at in [*range(12), len(data) - 1, *rng.sample(range(len(data)), 40)]:
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            with pytest.raises(CheckpointError, match=file.name):
                _load(saved, make_shards(1, empty=True))
        file.write_bytes(data)
    _load(saved, make_shards(1, empty=True))


def test_truncated_and_missing_files_are_named_before_anything_is_read(saved: Path) -> None:
    file = saved / "rank_00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors has \d+ bytes where"):
        open_checkpoint(saved)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is missing"):
        open_checkpoint(saved)
    # The save directory has no other checkpoint to fall back to.
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors is missing"):
        open_checkpoint(saved.parent)


def test_only_touched_blocks_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.checkpoint.writer.BLOCK_SIZE", 256)
    whole = torch.arange(1000.0).reshape(100, 10)
    tensor = SavedTensor("x", (100, 10), whole_copy((100, 10)), whole)
    path = write_checkpoint(tmp_path, 1, [[tensor]], {})
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    reader = open_checkpoint(path)
    assert len(reader.index.files[file.name].crc32) == -(-len(data) // 256)
    out = torch.empty(50, 10)
    reader.read_box("x", Box((0, 0), (50, 10)), out)
    assert torch.equal(out, whole[:50])
    with pytest.raises(CheckpointError, match=rf"bytes 3840 to {len(data)} do not match"):
        reader.read_box("x", Box((50, 0), (50, 10)), out)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        open_checkpoint(path).verify()


def test_files_of_another_checkpoint_are_noticed(tmp_path: Path) -> None:
    def tensor(shape: tuple[int, ...]) -> SavedTensor:
        return SavedTensor("x", shape, whole_copy(shape), torch.zeros(shape))

    path = write_checkpoint(tmp_path / "a", 1, [[tensor((2, 3))]], {})
    other = write_checkpoint(tmp_path / "b", 1, [[tensor((3, 2))]], {})
    file = "rank_00000.safetensors"
    (path / file).write_bytes((other / file).read_bytes())
    reader = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors"):
        reader.read_box("x", Box((0, 0), (2, 3)), torch.empty(2, 3))


def test_dtypes_change_only_when_asked(saved: Path, make_shards: MakeShards) -> None:
    reader = open_checkpoint(saved)
    (expected,) = make_shards(1)
    (stored,) = (t for t in expected if t.name == "optim/master/fc1")
    for dtype in (torch.bfloat16, torch.float64):
        out = SavedTensor(
            stored.name,
            stored.global_shape,
            stored.copies,
            torch.zeros(stored.tensor.shape, dtype=dtype),
        )
        with pytest.raises(CheckpointError, match=f"fc1 is torch.float32 there and {dtype} here"):
            reader.load([out])
        reader.load([out], convert=True)
        assert torch.equal(out.tensor, stored.tensor.to(dtype))
    with pytest.raises(CheckpointError, match=r"float32 there and torch\.int32 here"):
        reader.read_box(
            "optim/master/norm",
            Box((0,), (8,)),
            torch.zeros(8, dtype=torch.int32),
            convert=True,
        )


def test_what_is_not_there_is_named(saved: Path) -> None:
    reader = open_checkpoint(saved)

    def wanted(name: str, shape: tuple[int, ...]) -> SavedTensor:
        return SavedTensor(name, shape, whole_copy(shape), torch.zeros(shape, dtype=torch.bfloat16))

    with pytest.raises(CheckpointError, match="holds no tensor model/other"):
        reader.load([wanted("model/other", (2,))])
    with pytest.raises(CheckpointError, match=r"model/norm has shape \(8,\) there and \(9,\) here"):
        reader.load([wanted("model/norm", (9,))])
    with pytest.raises(ValueError, match="does not fit"):
        reader.read_box("model/norm", Box((0,), (8,)), torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"lacks Box\(start=\(8,\), shape=\(1,\)\)"):
        reader.read_box("model/norm", Box((0,), (9,)), torch.zeros(9, dtype=torch.bfloat16))


def test_parameters_are_filled_in_place(saved: Path, make_shards: MakeShards) -> None:
    (expected,) = make_shards(1)
    parameters = {t.name: torch.nn.Parameter(torch.zeros_like(t.tensor)) for t in expected}
    pointers = {name: p.data_ptr() for name, p in parameters.items()}
    open_checkpoint(saved).load(
        SavedTensor(t.name, t.global_shape, t.copies, parameters[t.name]) for t in expected
    )
    for t in expected:
        for copy in t.copies:
            index = copy.local.slices
            assert torch.equal(parameters[t.name][index], t.tensor[index])
        assert parameters[t.name].data_ptr() == pointers[t.name]


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent is not a directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        open_checkpoint(tmp_path)
