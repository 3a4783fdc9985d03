import errno
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.checkpoint.index import SavedTensor
from core.checkpoint.plan import RankFile, claim, make_plan
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.safetensors_io import SafetensorsWriter
from core.checkpoint.saver import CheckpointSaver, Ranks, Staging, save_checkpoint
from core.checkpoint.writer import write_checkpoint, write_rank_file
from core.config.parallel import ParallelConfig
from core.errors import CheckpointError, ConfigError
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block, split_blocks, whole_copy
from core.parallel.sharding import Box, BoxCopy
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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells it")
def test_forked_processes_do_not_inherit_the_staging() -> None:
    tensors = [saved("a", torch.ones(1 << 20)), saved("b", torch.ones(3))]
    staging = Staging(make_plan([claim(tensors)]).files[0], tensors)
    staging.fill()
    assert torch.equal(staging.bytes.view(torch.float32), torch.ones((1 << 20) + 3))
    address = staging.bytes.data_ptr()
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "dc" in flags  # "don't copy on fork"
    staging.free()


@pytest.mark.parametrize("step", [2, 4])
def test_two_runs_in_one_folder(tmp_path: Path, step: int) -> None:
    def run(number: float) -> CheckpointSaver:
        return CheckpointSaver(tmp_path, [saved("a", torch.full((2,), number))], SINGLE)

    old, new = run(1.0), run(2.0)
    old.save(2, {})
    new.save(step, {})
    new.save(6, {})
    with pytest.raises(CheckpointError, match=r"step_00000004 was not saved.*step_00000006, now"):
        old.save(4, {})
    new.save(8, {})
    assert open_checkpoint(tmp_path).step == 8
    assert not list(tmp_path.glob(".*"))


def test_another_save_of_the_same_step_is_noticed(tmp_path: Path) -> None:
    tensors = [saved("a", torch.ones(2))]
    first, same, other = (CheckpointSaver(tmp_path, tensors, SINGLE) for _ in range(3))
    first.save(2, {})
    same.save(2, {})  # bit by bit: nobody could tell
    first.save(4, {})
    other.save(4, {"train_state": 1})
    with pytest.raises(CheckpointError, match="saved by another run: end one of the two"):
        first.save(6, {})


def test_a_folder_that_another_run_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = [saved("a", torch.ones(2))]
    write = write_rank_file

    def interrupted(directory: Path, *args: Any) -> Any:
        found = write(directory, *args)
        monkeypatch.undo()
        CheckpointSaver(tmp_path, tensors, SINGLE).prepare()
        return found

    monkeypatch.setattr("core.checkpoint.saver.write_rank_file", interrupted)
    with pytest.raises(CheckpointError, match=r"No such file.*another run saves to the same"):
        CheckpointSaver(tmp_path, tensors, SINGLE).save(2, {})
    assert not list(tmp_path.iterdir())


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


# ---- In the background ---------------------------------------------------------------------------


class Gate:
    """Holds the background writers of some files until it is opened."""

    def __init__(self, patch: pytest.MonkeyPatch, *names: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

        def gated(directory: Path, file: RankFile, *args: Any) -> Any:
            if file.name in names:
                self.reached.set()
                assert self.open.wait(30)
            return write_rank_file(directory, file, *args)

        patch.setattr("core.checkpoint.saver.write_rank_file", gated)


def test_training_goes_on_while_the_copy_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch, "rank_00000.safetensors")
    flat = torch.arange(6.0)

    def piece(box: Box, values: Tensor) -> SavedTensor:
        copies = (BoxCopy(Box((0, 0), box.shape), box),)
        return SavedTensor("w", (2, 4), copies, values.view(box.shape))

    pieces = [
        piece(Box((0, 2), (1, 2)), flat[:2]),
        piece(Box((1, 0), (1, 4)), flat[2:]),
        piece(Box((0, 0), (1, 2)), torch.ones(2)),
        saved("b", torch.tensor(True)),
    ]
    saver = CheckpointSaver(tmp_path, pieces, SINGLE, asynchronous=True)
    path = saver.save(1, {"at": 1})
    assert gate.reached.wait(30)
    flat.zero_()
    saver.poll()
    assert not path.exists()
    gate.open.set()
    saver.wait()
    out, flag = torch.empty(2, 4), torch.tensor(False)
    reader = open_checkpoint(tmp_path)
    reader.load([saved("w", out), saved("b", flag)])
    assert out.tolist() == [[1, 1, 0, 1], [2, 3, 4, 5]]
    assert bool(flag)
    assert reader.sections == {"at": 1}
    # The next save is of the values then.
    saver.save(2, {})
    saver.save(3, {})  # waits for 2
    assert (tmp_path / "step_00000002" / "index.json").exists()
    saver.close(30)
    open_checkpoint(tmp_path).load([saved("w", out)])
    assert out.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_both_modes_write_the_same_bytes(tmp_path: Path, make_shards: MakeShards) -> None:
    for name, asynchronous in (("a", True), ("b", False)):
        run_ranks(
            4,
            lambda ranks, name=name, asynchronous=asynchronous: _save_and_wait(  # type: ignore[misc]
                CheckpointSaver(
                    tmp_path / name,
                    make_shards(4)[ranks.rank],
                    ranks,
                    asynchronous=asynchronous,
                )
            ),
        )
    assert len(_content(tmp_path / "a")) == 6
    assert _content(tmp_path / "a") == _content(tmp_path / "b")
    open_checkpoint(tmp_path / "a").verify()


def _save_and_wait(saver: CheckpointSaver) -> None:
    saver.save(1, {"x": 1})
    saver.wait()


def test_after_the_first_save_ranks_only_tell_how_it_went(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    gathered: list[list[Any]] = [[], []]

    def work(ranks: Ranks) -> set[str]:
        def gather(value: Any) -> list[Any]:
            gathered[ranks.rank].append(value)
            return ranks.gather(value)

        counted = Ranks(ranks.rank, gather)
        saver = CheckpointSaver(
            tmp_path, make_shards(2)[ranks.rank], counted, asynchronous=True, keep_last=2
        )
        names = set()
        for step in (1, 2, 3):
            saver.save(step, {})
            assert saver._pending is not None
            names.add(saver._pending.temporary.name)
        saver.poll()
        saver.wait()
        return names

    one, two = run_ranks(2, work)
    assert one == two
    assert len(one) == 3
    assert [values[2:] for values in gathered] == [[None] * 6] * 2
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        "latest",
        "step_00000002",
        "step_00000003",
    ]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_the_background_is_seen_at_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: MakeShards, failing: int
) -> None:
    savers = run_ranks(
        2,
        lambda ranks: CheckpointSaver(
            tmp_path, make_shards(2)[ranks.rank], ranks, asynchronous=True
        ),
    )
    gathers = {}

    def begin(ranks: Ranks, step: int) -> Path:
        savers[ranks.rank]._ranks = gathers[ranks.rank] = ranks
        path: Path = savers[ranks.rank].save(step, {})
        return path

    with monkeypatch.context() as patch:
        _fill_disk(patch, 300, f"rank_{failing:05d}.safetensors")
        assert run_ranks(2, lambda ranks: begin(ranks, 1)) == [tmp_path / "step_00000001"] * 2
        for rank in {0, failing}:  # rank 0 by the mark that the other leaves
            with pytest.raises(CheckpointError, match=f"rank {failing} failed: 'No space left"):
                _poll_for_long(savers[rank])
    # The next save reports it to all; the one after that works.
    for result in run_ranks(2, lambda ranks: begin(ranks, 2)):
        assert f"step_00000001 was not saved, rank {failing} failed" in str(result)
    assert list(tmp_path.iterdir()) == []
    run_ranks(2, lambda ranks: begin(ranks, 2))
    assert run_ranks(2, lambda ranks: _wait_with(savers[ranks.rank], ranks)) == [None, None]
    open_checkpoint(tmp_path).verify()


def _poll_for_long(saver: CheckpointSaver) -> None:
    for _ in range(3000):
        saver.poll()
        time.sleep(0.01)


def _wait_with(saver: CheckpointSaver, ranks: Ranks) -> None:
    saver._ranks = ranks
    saver.wait()


def test_rank_0_gives_a_dead_rank_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: MakeShards
) -> None:
    gate = Gate(monkeypatch, "rank_00001.safetensors")  # for a thread that died with its process
    savers = run_ranks(
        2,
        lambda ranks: _begin(
            CheckpointSaver(
                tmp_path, make_shards(2)[ranks.rank], ranks, asynchronous=True, timeout=0.2
            )
        ),
    )
    with pytest.raises(CheckpointError, match=r"no file of rank 1 came within 0 s"):
        _poll_for_long(savers[0])
    savers[1].close()  # waits for nothing
    assert savers[1]._pending is not None
    assert list(tmp_path.iterdir()) == []
    gate.open.set()


def _begin(saver: CheckpointSaver) -> CheckpointSaver:
    saver.save(1, {})
    return saver


def test_a_rank_that_cannot_copy_tells_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: MakeShards
) -> None:
    gate = Gate(monkeypatch, "rank_00000.safetensors")  # so that rank 0 makes no directory first
    fill = Staging.fill

    def fail(self: Staging) -> None:
        if threading.current_thread().name == "rank 1":
            raise RuntimeError("no such device")
        fill(self)

    monkeypatch.setattr(Staging, "fill", fail)

    def begin(ranks: Ranks) -> CheckpointSaver:
        threading.current_thread().name = f"rank {ranks.rank}"
        saver = CheckpointSaver(
            tmp_path, make_shards(2)[ranks.rank], ranks, asynchronous=True, timeout=30
        )
        return _begin(saver)

    savers = run_ranks(2, begin)
    gate.open.set()
    for saver in savers:
        with pytest.raises(CheckpointError, match="rank 1 failed: RuntimeError: no such device"):
            _poll_for_long(saver)


def test_a_rank_that_cannot_leave_a_mark_says_so_in_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_shards: MakeShards
) -> None:
    def mark(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("core.checkpoint.saver._leave_mark", mark)
    results = run_ranks(
        2, lambda ranks: save_checkpoint(tmp_path, 1, make_shards(2)[ranks.rank], {}, ranks)
    )
    assert all("rank 1 failed: 'Permission denied'" in str(result) for result in results)
    assert list(tmp_path.iterdir()) == []


def test_a_saver_leaves_its_own_save_in_progress_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".step_00000001.killed-1.tmp").mkdir()
    gate = Gate(monkeypatch, "rank_00000.safetensors")
    saver = CheckpointSaver(tmp_path, [saved("a", torch.ones(2))], SINGLE, asynchronous=True)
    saver.save(1, {})
    assert gate.reached.wait(30)
    saver.prepare()
    (under_way,) = tmp_path.glob(".step_*.tmp")
    assert "killed" not in under_way.name
    gate.open.set()
    saver.save(1, {})
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def test_assets_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    assets = tmp_path / "source"
    (assets / "additional_chat_templates").mkdir(parents=True)
    for name, text in {"tokenizer.json": "{}", "LICENSE": "", "x.bin": "no"}.items():
        (assets / name).write_text(text)
    (assets / "additional_chat_templates" / "a.jinja").write_text("hello")
    path = save_checkpoint(
        tmp_path / "run", 1, [saved("a", torch.ones(2))], {}, SINGLE, assets=assets
    )
    reader = open_checkpoint(path)
    sizes = {name: record.size for name, record in reader.index.files.items()}
    del sizes["rank_00000.safetensors"]
    assert sizes == {
        "hf/LICENSE": 0,
        "hf/tokenizer.json": 2,
        "hf/additional_chat_templates/a.jinja": 5,
    }
    reader.check_assets()
    reader.verify()
    (path / "hf" / "tokenizer.json").write_text("[]")
    for check in (open_checkpoint(path).check_assets, open_checkpoint(path).verify):
        with pytest.raises(CheckpointError, match=r"hf/tokenizer\.json is damaged"):
            check()
    (path / "hf" / "additional_chat_templates" / "a.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"a\.jinja is missing"):
        open_checkpoint(path)


def _train_like(root: str, steps: int) -> list[int]:
    """Replicated parameters, and optimizer fragments of one rank each, changing every step."""
    ctx = ParallelContext.create(ParallelConfig(), torch.device("cpu"))
    rank, size = ctx.world.rank, ctx.world.size
    parameter, flat = torch.zeros(8, 4), torch.zeros(2, 4)
    box = Box((2 * rank, 0), (2, 4))
    tensors = [
        *(saved(f"model/{i}", parameter) for i in range(size)),
        SavedTensor("optim/m", (2 * size, 4), (BoxCopy(Box((0, 0), (2, 4)), box),), flat),
    ]
    saver = CheckpointSaver(Path(root), tensors, ctx, asynchronous=True, keep_last=2)
    for step in range(1, steps + 1):
        saver.poll()
        parameter += 1
        flat += 1
        saver.save(step, {})
    saver.wait()
    saver.close()
    out = torch.empty(2 * size, 4)
    reader = open_checkpoint(Path(root))
    reader.load([saved("optim/m", out), saved("model/0", parameter)])
    return [int(x) for x in (*out.unique(), *parameter.unique(), len(reader.index.files))]


def test_processes_save_in_the_background(tmp_path: Path, pool: WorkerPool) -> None:
    assert pool.run(_train_like, 4, str(tmp_path), 5) == [[5, 5, 4]] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000005",
    ]
