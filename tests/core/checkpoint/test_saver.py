import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint.index import SavedTensor
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.safetensors_io import SafetensorsWriter
from core.checkpoint.saver import Ranks, save_checkpoint
from core.checkpoint.writer import write_checkpoint
from core.config.parallel import ParallelConfig
from core.errors import CheckpointError, ConfigError
from core.parallel.context import ParallelContext
from core.parallel.sharding import Block, split_blocks, whole_copy
from core.testing.distributed import WorkerPool

MakeShards = Callable[..., list[list[SavedTensor]]]
SINGLE = ParallelContext.single()


def saved(name: str, tensor: Tensor) -> SavedTensor:
    shape = tuple(tensor.shape)
    return SavedTensor(name, shape, whole_copy(shape), tensor)


def run_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Run `work` as every rank, on threads; exceptions are results."""
    barrier = threading.Barrier(size, timeout=30)
    slots: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            found = list(slots)
            barrier.wait()
            return found

        try:
            results[rank] = work(Ranks(rank, gather))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_sections_and_pruning_of_a_single_process(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        sections = {"config": {"sizes": (1, 2)}, "train_state": {"step": step}}
        path = save_checkpoint(
            tmp_path, step, [saved("a", torch.ones(2))], sections, SINGLE, keep_last=2
        )
    assert path == tmp_path / "step_00000003"
    found = sorted(entry.name for entry in tmp_path.iterdir())
    assert found == ["latest", "step_00000002", "step_00000003"]
    reader = open_checkpoint(tmp_path)
    assert (reader.step, reader.sections) == (
        3,
        {"config": {"sizes": [1, 2]}, "train_state": {"step": 3}},
    )


@pytest.mark.parametrize(("keep_last", "keep_every"), [(None, 5), (0, None), (2, 0), (-1, 3)])
def test_retention_that_cannot_work_is_refused(
    tmp_path: Path, keep_last: int | None, keep_every: int | None
) -> None:
    with pytest.raises(ConfigError, match="keep_every"):
        save_checkpoint(tmp_path, 1, [], {}, SINGLE, keep_last=keep_last, keep_every=keep_every)


def _content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class DiskFull:
    """Stands for the file of a writer; fails once `room` bytes are written."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: memoryview) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _fill_disk(patch: pytest.MonkeyPatch, room: int, file_name: str) -> None:
    init = SafetensorsWriter.__init__

    def full(self: SafetensorsWriter, path: Path, *args: Any, **kwargs: Any) -> None:
        init(self, path, *args, **kwargs)
        if path.name == file_name:
            self._file = DiskFull(self._file, room)  # type: ignore[assignment]

    patch.setattr(SafetensorsWriter, "__init__", full)


@pytest.mark.parametrize("room", [0, 300])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_shards: MakeShards,
    room: int,
    failing: int,
) -> None:
    shards = make_shards(2)

    def save(step: int) -> list[Any]:
        return run_ranks(
            2, lambda ranks: save_checkpoint(tmp_path, step, shards[ranks.rank], {}, ranks)
        )

    assert save(1) == [tmp_path / "step_00000001"] * 2
    before = _content(tmp_path)
    with monkeypatch.context() as patch:
        _fill_disk(patch, room, f"rank_{failing:05d}.safetensors")
        results = save(2)
    for result in results:
        assert isinstance(result, CheckpointError)
        assert f"step_00000002 was not saved, rank {failing} failed" in str(result)
        assert "No space left on device" in str(result)
    assert _content(tmp_path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert save(2) == [tmp_path / "step_00000002"] * 2


def test_other_failures_are_agreed_on_too(tmp_path: Path, make_shards: MakeShards) -> None:
    shards = make_shards(2)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    results = run_ranks(2, lambda ranks: save_checkpoint(blocked, 1, shards[ranks.rank], {}, ranks))
    assert all("was not saved, rank 0 failed" in str(result) for result in results)
    results = run_ranks(
        2,
        lambda ranks: save_checkpoint(
            tmp_path, 1, shards[ranks.rank], {} if ranks.rank else {"x": object()}, ranks
        ),
    )
    assert all("rank 0 failed: TypeError" in str(result) for result in results)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_at_publication_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, [saved("a", torch.ones(2))], {}, SINGLE)
    before = _content(tmp_path)

    def full(path: Path, text: str) -> None:
        path.write_text(text[:5])
        if path.name == ".latest.tmp":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("core.checkpoint.directory._write_text", full)
    with pytest.raises(CheckpointError, match=r"was not saved.*No space left on device"):
        save_checkpoint(tmp_path, 2, [saved("a", torch.ones(2))], {}, SINGLE)
    assert _content(tmp_path) == before
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path, 2, [[saved("a", torch.ones(2))]], {})
    assert _content(tmp_path) == before


def test_a_killed_save_leaves_latest_and_its_rest_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [saved("a", torch.ones(2))]
    save_checkpoint(tmp_path, 1, tensors, {}, SINGLE)
    with monkeypatch.context() as patch:
        patch.setattr("core.checkpoint.saver.remove_attempt", lambda *_: None)
        patch.setattr("core.checkpoint.saver.publish", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            save_checkpoint(tmp_path, 2, tensors, {}, SINGLE)
    assert len(list(tmp_path.glob(".step_00000002.*.tmp/rank_00000.safetensors"))) == 1
    assert open_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, 3, tensors, {}, SINGLE)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "latest",
        "step_00000001",
        "step_00000003",
    ]


def _save_and_load(root: str, tp: int) -> bool:
    ctx = ParallelContext.create(ParallelConfig(tp=tp), torch.device("cpu"))
    whole = torch.arange(32.0).reshape(8, 4)
    size, copies = split_blocks((Block(4), Block(4)), ctx.tp.rank, ctx.tp.size, other=(4,))
    local = torch.zeros(size, 4)
    for copy in copies:
        local[copy.local.slices] = whole[copy.global_.slices]
    save_checkpoint(Path(root), tp, [SavedTensor("w", (8, 4), copies, local)], {"tp": tp}, ctx)
    out = torch.empty(8, 4)
    reader = open_checkpoint(Path(root))
    reader.load([saved("w", out)])
    return torch.equal(out, whole) and reader.sections == {"tp": tp}


@pytest.mark.parametrize("tp", [1, 2])
def test_processes_save_together(tmp_path: Path, pool: WorkerPool, tp: int) -> None:
    assert pool.run(_save_and_load, 2, str(tmp_path), tp) == [True, True]
    assert len(open_checkpoint(tmp_path).index.files) == 2  # data-parallel replicas share the work
