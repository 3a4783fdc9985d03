"""Saving from all ranks, in the background or not.

    first save   the ranks gather what each holds, once: the plan stays, and so does the staging
    save         each rank copies its boxes into its staging, and training goes on
    background   each rank's thread writes its file and leaves a mark beside it; rank 0's thread
                 waits for all marks, then publishes and removes old checkpoints
    wait         the ranks tell each other how it went

Background threads use the file system alone, no collective, which would have to be ordered among
those of training. A synchronous save is the same with the wait at its end and without staging. In
overlapping a snapshot's write with training it follows CheckFreq (Mohan et al., 2021).
"""

import json
import mmap
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from core.checkpoint.directory import (
    newest_published,
    prune,
    publish,
    remove_leftovers,
    step_name,
)
from core.checkpoint.index import BLOCK_SIZE, FileRecord, Index, SavedTensor, plain_json
from core.checkpoint.plan import Claims, Plan, RankFile, claim, make_plan
from core.checkpoint.writer import (
    held_boxes,
    local_slice,
    remove_attempt,
    write_assets,
    write_rank_file,
)
from core.errors import CheckpointError, ConfigError, TesseraError
from core.parallel.context import ParallelContext

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a save: this one's number, and a gather of one object from every rank."""

    rank: int
    gather: Callable[[Any], list[Any]]

    @classmethod
    def of(cls, ctx: ParallelContext) -> "Ranks":
        """The world of a context."""
        group, size = ctx.world.group, ctx.world.size

        def gather(value: Any) -> list[Any]:
            if group is None:
                return [value]
            found: list[Any] = [None] * size
            dist.all_gather_object(found, value, group=group)
            return found

        return cls(ctx.world.rank, gather)

    def agree(self, work: Callable[[], T], what: str) -> list[T]:
        """Do this rank's work, then gather all results. Collective: one gather.

        Raises:
            CheckpointError: on every rank, if one failed; it begins with `what`.
        """
        result: T | None = None
        cause: Exception | None = None
        try:
            result = work()
        except Exception as error:
            cause = error
        outcomes = self.gather((result, None if cause is None else describe(cause)))
        for rank, (_, reason) in enumerate(outcomes):
            if reason is not None:
                raise CheckpointError(f"{what}, rank {rank} failed: {reason}") from cause
        return [result for result, _ in outcomes]


def describe(error: Exception) -> str:
    """What went wrong, for the sentence that all ranks report."""
    if isinstance(error, FileNotFoundError):
        # A saver makes its folder itself, and only another one removes it.
        return (
            f"'{error.strerror or error}' ({error.filename}): if another run saves to the same "
            "folder, end one of the two"
        )
    if isinstance(error, OSError):
        return f"'{error.strerror or error}': free disk space or choose another save directory"
    return str(error) if isinstance(error, TesseraError) else f"{type(error).__name__}: {error}"


class Staging:
    """Host memory for the boxes that a rank writes, laid out as they lie in its file."""

    def __init__(self, file: RankFile, tensors: Sequence[SavedTensor]) -> None:
        """Allocate, with all pages: a lack of memory shows now, not at some save.

        Raises:
            CheckpointError: there is not enough memory.
        """
        self._cuda = any(saved.tensor.is_cuda for saved in tensors)
        try:
            self.bytes = _memory_of_its_own(file.nbytes).fill_(0)
            self._pin()
        except (RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{file.nbytes / 2**30:.1f} GiB of host memory for asynchronous saves cannot be "
                f"had ({error}): save synchronously (--train.no-async-save)"
            ) from error
        self._pairs: list[tuple[Tensor, Tensor]] = []
        where, at = held_boxes(tensors), 0
        for key, (dtype, shape) in zip(file.boxes, file.entries.values(), strict=True):
            source = local_slice(*where[key]).detach()
            size = source.numel() * dtype.itemsize
            self._pairs.append((self.bytes[at : at + size].view(dtype).view(shape), source))
            at += size

    def _pin(self) -> None:
        # Not through torch's pinned allocator, which rounds up to a power of two.
        if self._cuda and self.bytes.numel():
            runtime = torch.cuda.cudart()
            status = runtime.cudaHostRegister(self.bytes.data_ptr(), self.bytes.numel(), 0)
            if int(status):
                raise RuntimeError(f"cudaHostRegister failed with error {int(status)}")

    @torch.no_grad()
    def fill(self) -> None:
        """Copy all boxes; on CUDA the copies are only queued when this returns."""
        for staged, source in self._pairs:
            staged.copy_(source, non_blocking=True)

    def free(self) -> None:
        """Give the memory back."""
        if self._cuda and self.bytes.numel():
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        self._pairs.clear()
        self.bytes = torch.empty(0, dtype=torch.uint8)


def _memory_of_its_own(size: int) -> Tensor:
    """Flat uint8 that forked processes do not inherit: the loader's would keep the pages as they
    were, so that the next copy takes as much again (or, where a device has them pinned, take a copy
    each at once).
    """
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux
        memory.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


@dataclass
class _Attempt:
    """One save, from its start until the ranks have told each other how it went."""

    step: int
    temporary: Path
    sections: Any = None
    failure: str | None = None
    """Why it will not be published, as far as this rank knows."""
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's file is done, or has failed."""
    done: threading.Event = field(default_factory=threading.Event)
    """This rank has nothing left to do; rank 0 has published, or given up."""
    given_up: threading.Event = field(default_factory=threading.Event)
    """Rank 0 need not wait for the others any more."""


class CheckpointSaver:
    """Saves the same tensors again and again, as checkpoints of a run.

    The calls that are collective must be made by all ranks in the same order. A save that fails
    leaves the checkpoints that were there; one that is killed leaves a temporary directory as
    well, which the next saver removes.
    """

    def __init__(
        self,
        root: Path,
        tensors: Sequence[SavedTensor],
        ctx: ParallelContext | Ranks,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        assets: Path | None = None,
        asynchronous: bool = False,
        timeout: float | None = None,
    ) -> None:
        """No communication.

        Args:
            root: the save directory, shared by all machines.
            tensors: what this rank holds: live views, which stay valid.
            ctx: the process axes (or what stands for them where there is no process group).
            keep_last: number of newest checkpoints to keep; None keeps all.
            keep_every: steps that are multiples of this are kept as well.
            assets: folder of small files that belong to the weights (`core.checkpoint.assets`), to
                be part of every checkpoint.
            asynchronous: write in the background, from a copy in host memory of what this rank
                writes; else from the tensors themselves.
            timeout: seconds that rank 0 waits for a further rank to finish after it or another one
                has; None for no limit.

        Raises:
            ConfigError: `keep_last` or `keep_every` cannot work.
        """
        if keep_last is None and keep_every is not None:
            raise ConfigError("keep_every does nothing without keep_last: give both or neither")
        if any(number is not None and number < 1 for number in (keep_last, keep_every)):
            raise ConfigError(
                f"keep_last is {keep_last} and keep_every {keep_every}: each must be at least 1"
            )
        self._root, self._tensors = root, tuple(tensors)
        self._ranks = ctx if isinstance(ctx, Ranks) else Ranks.of(ctx)
        self._keep = (keep_last, keep_every)
        self._assets, self._asynchronous, self._timeout = assets, asynchronous, timeout
        self._plan: Plan | None = None
        self._staging: Staging | None = None
        self._token, self._count = "", 0
        self._pending: _Attempt | None = None
        self._newest: tuple[str, int] | None = None
        """What this saver published last, as rank 0 knows."""
        self._damaged: set[str] = set()

    def count_as_damaged(self, names: Collection[str]) -> None:
        """Do not count these step directories among the newest that are kept, until they are
        replaced. No communication; rank 0's word counts.
        """
        self._damaged.update(names)

    def prepare(self) -> None:
        """Gather what the ranks hold, plan, and allocate staging, unless that is done already.

        Collective the first time: two gathers.

        Raises:
            CheckpointError: on every rank: the tensors do not make up whole ones, the save
                directory cannot be read, or memory is short on a rank.
        """
        if self._plan is not None:
            return

        def look() -> tuple[Claims, str]:
            if self._ranks.rank == 0:
                remove_leftovers(self._root)  # no rank can have begun to write: see the gather
            return claim(self._tensors), uuid.uuid4().hex[:8]

        what = f"nothing can be saved to {self._root}"
        held = self._ranks.agree(look, what)
        plan = make_plan([claims for claims, _ in held])
        # A name of its own for every save, without asking: no two savers share rank 0's token.
        self._token = held[0][1]

        def allocate() -> None:
            if self._asynchronous:
                self._staging = Staging(plan.files[self._ranks.rank], self._tensors)

        self._ranks.agree(allocate, what)
        self._plan = plan

    def save(self, step: int, sections: Mapping[str, Any]) -> Path:
        """Save as `root/step_<step>` and make it the newest checkpoint.

        Collective: waits for the save before, if there is one, and prepares. An asynchronous save
        is under way when this returns, a synchronous one is published.

        Args:
            step: number of finished training steps.
            sections: JSON to remember (`config`, `train_state`, `source`); rank 0's counts.

        Returns:
            The step directory.

        Raises:
            CheckpointError: on every rank, if any rank could not write, now or at the save before.
        """
        self.wait()
        self.prepare()
        self._count += 1
        attempt = _Attempt(step, self._root / f".{step_name(step)}.{self._token}-{self._count}.tmp")
        try:
            if self._ranks.rank == 0:
                attempt.sections = plain_json(sections)
            if self._staging is not None:
                self._staging.fill()
            _wait_for_devices(self._tensors)
        except Exception as error:  # the other ranks have begun: it must reach them as a failure
            attempt.failure = self._sentence(attempt, self._ranks.rank, describe(error))
        self._pending = attempt
        threading.Thread(
            target=self._work, args=(attempt,), name=f"save-{step}", daemon=True
        ).start()
        if not self._asynchronous:
            self.wait()
        return self._root / step_name(step)

    def poll(self) -> None:
        """Look whether the save in the background has failed. No communication.

        Raises:
            CheckpointError: it has, as far as this rank knows.
        """
        if self._pending is not None and self._pending.failure is not None:
            raise CheckpointError(self._pending.failure)

    def wait(self) -> None:
        """Wait until the pending save, if there is one, is published.

        Collective if there is one: two gathers.

        Raises:
            CheckpointError: on every rank, if it failed on any.
        """
        attempt = self._pending
        if attempt is None:
            return
        attempt.written.wait()
        failures = self._ranks.gather(attempt.failure)
        if any(failures):
            # A rank that cannot even leave a mark says so here.
            attempt.given_up.set()
        attempt.done.wait()
        failures += self._ranks.gather(attempt.failure)
        self._pending = None
        failed = next((failure for failure in failures if failure is not None), None)
        if failed is not None:
            if self._ranks.rank == 0:  # once more: now no rank is writing
                remove_attempt(self._root, attempt.temporary)
            raise CheckpointError(failed)

    def close(self, seconds: float = 0.0) -> None:
        """Give the staging back. No communication.

        Args:
            seconds: how long a pending save may take to become a checkpoint before; a run that
                fails has this left to hope for.
        """
        if self._pending is not None and not self._pending.done.wait(seconds):
            return  # its thread still reads the staging
        if self._staging is not None:
            self._staging.free()
        self._staging = self._plan = self._pending = None

    # ---- In the background -----------------------------------------------------------------------

    def _work(self, attempt: _Attempt) -> None:
        assert self._plan is not None
        own, rank = self._plan.files[self._ranks.rank], self._ranks.rank
        files: dict[str, FileRecord] = {}
        try:
            if own.boxes or rank == 0 or attempt.failure is not None:
                attempt.temporary.mkdir(parents=True, exist_ok=True)
            if own.boxes and attempt.failure is None:
                source = self._tensors if self._staging is None else self._staging.bytes
                files = write_rank_file(attempt.temporary, own, source)
                if rank:
                    _leave_mark(attempt.temporary, rank, files, None)
        except Exception as error:
            attempt.failure = self._sentence(attempt, rank, describe(error))
        if rank and attempt.failure is not None:
            with suppress(OSError):  # then rank 0 hears of it in `wait`, or gives up in the end
                _leave_mark(attempt.temporary, rank, {}, attempt.failure)
        attempt.written.set()
        if rank == 0:
            self._finish(attempt, self._plan, files)
        attempt.done.set()

    def _finish(self, attempt: _Attempt, plan: Plan, files: dict[str, FileRecord]) -> None:
        """Rank 0: wait for all files, and publish or clean up."""
        failure = attempt.failure
        try:
            if failure is None:
                writers = {rank for rank, file in enumerate(plan.files) if rank and file.boxes}
                failure = self._collect(attempt, writers, files)
            if failure is None:
                if self._assets is not None:
                    files |= write_assets(self._assets, attempt.temporary)
                in_order = dict(sorted(files.items()))
                index = Index(attempt.step, plan.tensors, in_order, attempt.sections, BLOCK_SIZE)
                self._check_alone()
                publish(self._root, attempt.temporary, index)
                self._newest = (step_name(attempt.step), zlib.crc32(index.dump().encode()))
                self._damaged.discard(step_name(attempt.step))
                prune(self._root, attempt.step, *self._keep, self._damaged)
        except Exception as error:
            failure = self._sentence(attempt, 0, describe(error))
        if failure is not None:
            remove_attempt(self._root, attempt.temporary)
        attempt.failure = failure

    def _check_alone(self) -> None:
        """Two runs in one folder would replace and remove each other's checkpoints, and each go on
        from what the other has saved: the one whose newest is no longer the newest stops.
        """
        found = newest_published(self._root)
        if self._newest is not None and found is not None and found != self._newest:
            raise CheckpointError(
                f"{found[0]}, now the newest checkpoint in {self._root}, was saved by another run: "
                "end one of the two, or give each a folder of its own"
            )

    def _collect(
        self, attempt: _Attempt, missing: set[int], files: dict[str, FileRecord]
    ) -> str | None:
        """Take the marks of all these ranks; returns why there is none to wait for any more."""
        pause, since = 0.01, time.monotonic()
        while missing:
            there = set(os.listdir(attempt.temporary))
            marked = [rank for rank in sorted(missing) if _mark_name(rank) in there]
            for rank in marked:
                written, failure = _take_mark(attempt.temporary / _mark_name(rank))
                if failure is not None:
                    return failure
                files.update(written)
                missing.discard(rank)
            if marked:
                since = time.monotonic()
            elif self._timeout is not None and time.monotonic() - since > self._timeout:
                late = ", ".join(map(str, sorted(missing)[:8]))
                reason = f"no file of rank {late} came within {self._timeout:.0f} s"
                return self._sentence(attempt, 0, reason)
            elif attempt.given_up.wait(pause):
                return self._sentence(attempt, 0, "another rank failed")
            else:
                pause = min(1.5 * pause, 0.5)
        return None

    def _sentence(self, attempt: _Attempt, rank: int, reason: str) -> str:
        path = self._root / step_name(attempt.step)
        return f"{path} was not saved, rank {rank} failed: {reason}"


def _mark_name(rank: int) -> str:
    return f"rank_{rank:05d}.mark.json"


def _leave_mark(
    directory: Path, rank: int, files: Mapping[str, FileRecord], failure: str | None
) -> None:
    """Tell rank 0 that this rank has done its part, or that it has failed."""
    content = {"files": {name: asdict(record) for name, record in files.items()}}
    aside = directory / f".{_mark_name(rank)}.tmp"
    aside.write_text(json.dumps({**content, "failure": failure}), encoding="utf-8")
    aside.rename(directory / _mark_name(rank))


def _take_mark(path: Path) -> tuple[dict[str, FileRecord], str | None]:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    files = {
        name: FileRecord(record["size"], tuple(record["crc32"]))
        for name, record in content["files"].items()
    }
    return files, content["failure"]


def _wait_for_devices(tensors: Sequence[SavedTensor]) -> None:
    for device in {saved.tensor.device for saved in tensors}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Sequence[SavedTensor],
    sections: Mapping[str, Any],
    ctx: ParallelContext | Ranks,
    **options: Any,
) -> Path:
    """Save once and wait. Collective; `options` and errors are those of `CheckpointSaver`.

    Returns:
        The step directory.
    """
    return CheckpointSaver(root, tensors, ctx, **options).save(step, sections)
