import errno
import logging
import os
from pathlib import Path

import pytest

from core.checkpoint.directory import (
    newest_complete,
    prune,
    publish,
    read_latest,
    remove_leftovers,
    step_directories,
    step_name,
)
from core.checkpoint.index import FileRecord, Index
from core.errors import CheckpointError

FILE = "rank_00000.safetensors"


def put(root: Path, step: int, size: int = 10) -> Path:
    temporary = root / f".{step_name(step)}.x.tmp"
    temporary.mkdir(parents=True)
    (temporary / FILE).write_bytes(bytes(size))
    return publish(root, temporary, Index(step, {}, {FILE: FileRecord(size, (0,))}, {}, 64))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_publish_moves_latest_and_replaces_the_same_step(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    assert newest_complete(tmp_path / "absent") is None
    assert put(tmp_path, 5) == tmp_path / "step_00000005"
    assert put(tmp_path, 123456789).name == "step_123456789"
    assert put(tmp_path, 5, size=20) == newest_complete(tmp_path)
    assert read_latest(tmp_path) == (tmp_path / "step_00000005", None)
    assert names(tmp_path) == ["latest", "step_00000005", "step_123456789"]
    assert (tmp_path / "step_00000005" / FILE).stat().st_size == 20
    assert list(step_directories(tmp_path)) == [123456789, 5]


def test_publish_wants_every_file_in_full(tmp_path: Path) -> None:
    temporary = tmp_path / ".step_00000001.x.tmp"
    temporary.mkdir()
    for size in (None, 9):
        if size is not None:
            (temporary / FILE).write_bytes(bytes(size))
        with pytest.raises(CheckpointError, match="must be one that all machines share"):
            publish(tmp_path, temporary, Index(1, {}, {FILE: FileRecord(10, (0,))}, {}, 64))
    assert names(tmp_path) == [temporary.name]


@pytest.mark.parametrize("latest", ["", "nonsense", "../step_00000001", "step_00000003"])
def test_without_a_usable_latest_the_highest_complete_step_counts(
    tmp_path: Path, latest: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)
    (put(tmp_path, 3) / FILE).write_bytes(bytes(3))
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "latest").write_text(latest)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) == tmp_path / "step_00000002"
    assert "passing over step_00000003" in caplog.text
    assert "passing over step_00000004" in caplog.text


def test_latest_counts_before_a_higher_step(tmp_path: Path) -> None:
    put(tmp_path, 9)
    put(tmp_path, 4)
    assert newest_complete(tmp_path) == tmp_path / "step_00000004"


def test_a_kill_between_the_renames_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 2)
    assert newest_complete(tmp_path) == tmp_path / "step_00000001"
    put(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_a_kill_while_a_step_is_replaced_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 5)
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 5, size=20)
    for _ in range(2):
        found = newest_complete(tmp_path)
        assert found is not None
        assert (found / FILE).stat().st_size == 10
        remove_leftovers(tmp_path)
    put(tmp_path, 5, size=20)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["latest", "step_00000005"]
    assert (tmp_path / "step_00000005" / FILE).stat().st_size == 20


def test_a_failed_rename_puts_the_replaced_step_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise PermissionError(13, "denied")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(PermissionError):
            put(tmp_path, 1, size=20)
    found = newest_complete(tmp_path)
    assert found is not None
    assert (found / FILE).stat().st_size == 10


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (tmp_path / ".step_00000002.abc.tmp").mkdir()
    (tmp_path / ".step_00000002.abc.tmp" / FILE).write_bytes(b"x")
    (tmp_path / ".mine").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine", "latest", "step_00000001"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, [10, 20, 30, 40, 50]),
        (1, None, [50]),
        (3, None, [30, 40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
        (1, 20, [20, 40, 50]),
    ],
)
def test_pruning(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, kept: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        put(tmp_path, step)
    prune(tmp_path, 50, keep_last, keep_every)
    assert names(tmp_path) == ["latest", *map(step_name, kept)]


def test_pruning_keeps_latest_and_the_steps_of_a_run_taken_back(tmp_path: Path) -> None:
    for step in (10, 30, 20):
        put(tmp_path, step)
    prune(tmp_path, 30, 1, None)
    assert names(tmp_path) == ["latest", "step_00000020", "step_00000030"]
    put(tmp_path, 25)
    prune(tmp_path, 25, 1, None)
    assert names(tmp_path) == ["latest", "step_00000025", "step_00000030"]


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        ([40], [20, 30, 40, 50]),
        ([10, 40], [20, 30, 40, 50]),
        ([30, 40], [10, 20, 30, 40, 50]),
        ([20, 30, 40], [10, 20, 30, 40, 50]),
    ],
)
def test_what_is_damaged_does_not_count_among_the_newest(
    tmp_path: Path, damaged: list[int], kept: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        put(tmp_path, step)
    prune(tmp_path, 50, 3, None, list(map(step_name, damaged)))
    assert names(tmp_path) == ["latest", *map(step_name, kept)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_flush_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if number == errno.EIO:  # the disk is bad
        with pytest.raises(OSError, match="Input/output error"):
            put(tmp_path, 1)
    else:
        assert put(tmp_path, 1) == newest_complete(tmp_path)


def test_a_checkpoint_that_cannot_be_removed_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 1)
    put(tmp_path, 2)

    def fail(self: Path, target: Path) -> Path:
        raise PermissionError(13, "denied")

    monkeypatch.setattr(Path, "rename", fail)
    with caplog.at_level(logging.WARNING):
        prune(tmp_path, 2, 1, None)
    assert "could not remove the old checkpoint" in caplog.text
    assert newest_complete(tmp_path) == tmp_path / "step_00000002"
