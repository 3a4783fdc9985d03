from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.checkpoint.index import SavedTensor
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.safetensors_io import SafetensorsFile
from core.checkpoint.writer import write_checkpoint
from core.errors import CheckpointError
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block, split_blocks, whole_copy
from core.parallel.sharding import Box, BoxCopy

MakeShards = Callable[..., list[list[SavedTensor]]]
SINGLE = ParallelContext.single()


def saved(name: str, tensor: Tensor) -> SavedTensor:
    shape = tuple(tensor.shape)
    return SavedTensor(name, shape, whole_copy(shape), tensor)


def rows(start: int, stop: int) -> tuple[BoxCopy, ...]:
    return (BoxCopy(Box((0,), (stop - start,)), Box((start,), (stop - start,))),)


def test_replicated_heads_are_written_once(tmp_path: Path, make_shards: MakeShards) -> None:
    path = write_checkpoint(tmp_path, 1, make_shards(4), {})
    reader = open_checkpoint(path)
    boxes = reader.tensors["model/qkv"].boxes
    assert len(boxes) == 4 + 2 + 2  # four ranks' q; two k and v heads, each held by two ranks
    files = [file for _, file in boxes]
    assert sorted(set(files)) == [f"rank_0000{rank}.safetensors" for rank in range(4)]
    stored = sum(SafetensorsFile(path / file).body_start for file in reader.index.files)
    body = sum(record.size for record in reader.index.files.values()) - stored
    assert body == sum(record.nbytes for record in reader.tensors.values())


def test_a_tensor_with_a_hole_or_two_shapes_is_not_saved(tmp_path: Path) -> None:
    half = SavedTensor("model/a", (4,), rows(0, 2), torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"model/a .* no rank holds Box\(start=\(2,\)"):
        write_checkpoint(tmp_path, 1, [[half]], {})
    other = SavedTensor("model/a", (4,), rows(2, 4), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r"cannot save model/a: .* on rank 1"):
        write_checkpoint(tmp_path, 1, [[half], [other]], {})
    assert list(tmp_path.iterdir()) == []


def test_fragments_of_a_flat_buffer_are_boxes(tmp_path: Path) -> None:
    """ZeRO-1: rank 0 holds elements 0..7 of a flattened [3, 4] tensor, rank 1 the rest."""
    whole = torch.arange(12.0).reshape(3, 4)
    local = [torch.zeros(3, 4), torch.zeros(3, 4)]
    local[0].view(-1)[:7] = whole.view(-1)[:7]
    local[1].view(-1)[7:] = whole.view(-1)[7:]
    boxes = [
        [Box((0, 0), (1, 4)), Box((1, 0), (1, 3))],
        [Box((1, 3), (1, 1)), Box((2, 0), (1, 4))],
    ]
    shards = [
        [SavedTensor("optim/exp_avg/w", (3, 4), tuple(BoxCopy(b, b) for b in held), tensor)]
        for held, tensor in zip(boxes, local, strict=True)
    ]
    write_checkpoint(tmp_path, 1, shards, {})
    out = torch.empty(3, 4)
    open_checkpoint(tmp_path).load([saved("optim/exp_avg/w", out)])
    assert torch.equal(out, whole)


def test_flat_pieces_of_one_name_are_read_into_other_pieces(tmp_path: Path) -> None:
    """ZeRO-1 as it is: a rank holds a flat run of a tensor, cut into pieces shaped like boxes."""
    whole = torch.arange(24.0).reshape(6, 4)

    def pieces(first: int, last: int, flat: Tensor) -> list[SavedTensor]:
        boxes = []
        at = first
        while at < last:
            row, column = divmod(at, 4)
            rows_ = max(1, (last - at) // 4) if column == 0 else 1
            size = min(rows_ * 4 if column == 0 else 4 - column, last - at)
            boxes.append((Box((row, column), (rows_, size // rows_)), at - first))
            at += size
        return [
            SavedTensor(
                "optim/exp_avg/w",
                (6, 4),
                (BoxCopy(Box((0, 0), box.shape), box),),
                flat[start : start + box.numel].view(box.shape),
            )
            for box, start in boxes
        ]

    def shards(cuts: list[int], *, empty: bool) -> tuple[list[list[SavedTensor]], list[Tensor]]:
        runs = list(pairwise(cuts))
        flats = [
            torch.zeros(last - first) if empty else whole.view(-1)[first:last].clone()
            for first, last in runs
        ]
        return [pieces(*run, flat) for run, flat in zip(runs, flats, strict=True)], flats

    saved_shards, _ = shards([0, 7, 18, 24], empty=False)
    assert [len(pieces) for pieces in saved_shards] == [2, 3, 2]
    path = write_checkpoint(tmp_path, 1, saved_shards, {})
    loaded, flats = shards([0, 1, 10, 23, 24], empty=True)
    reader = open_checkpoint(path)
    for pieces_ in loaded:
        reader.load(pieces_)
    assert torch.equal(torch.cat(flats), whole.view(-1))


def test_bodies_are_aligned_and_read_by_the_package(tmp_path: Path) -> None:
    tensors = [
        saved("a", torch.ones(3, dtype=torch.int8)),
        saved("b", torch.ones(3, dtype=torch.bfloat16)),
        saved("c", torch.ones(3, dtype=torch.float64)),
        saved("d", torch.ones(3)),
    ]
    path = write_checkpoint(tmp_path, 1, [tensors], {})
    file = SafetensorsFile(path / "rank_00000.safetensors")
    keys = file.keys()
    assert keys == ["c@0", "d@0", "b@0", "a@0"]
    for key in keys:
        assert file.span(key)[0] % file.dtype(key).itemsize == 0


def test_boxes_are_fetched_one_at_a_time_for_meta_tensors(tmp_path: Path) -> None:
    values = {"a": torch.randn(4, 3), "b": torch.randn(2)}
    fetched: list[str] = []

    def fetch(tensor: SavedTensor, copy: BoxCopy) -> Tensor:
        fetched.append(tensor.name)
        return values[tensor.name][copy.global_.slices]

    shards = []
    for rank in range(2):
        _, copies = split_blocks((Block(4),), rank, 2, other=(3,))
        a = SavedTensor("a", (4, 3), copies, torch.empty(2, 3, device="meta"))
        shards.append([a, saved("b", torch.empty(2, device="meta"))])
    write_checkpoint(tmp_path, 1, shards, {}, fetch)
    assert fetched == ["a", "b", "a"]
    out = {name: torch.empty_like(value) for name, value in values.items()}
    open_checkpoint(tmp_path).load([saved(name, tensor) for name, tensor in out.items()])
    assert all(torch.equal(out[name], values[name]) for name in values)
