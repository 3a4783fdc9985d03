import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from core.data.loader import Batch, BatchLoader
from core.data.samples import Sample
from core.errors import DataError


class Numbered:
    """Sample i holds i everywhere."""

    def __init__(self, length: int = 96, bad: int = -1, delay: float = 0.0) -> None:
        self.length, self.bad, self.delay = length, bad, delay

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.delay)
        if index == self.bad:
            raise DataError(f"sample {index} is damaged")
        return {
            "tokens": np.full(4, index),
            "labels": np.full(4, index + 1),
            "loss_mask": np.arange(4) <= index,
        }


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in batches]


def global_batch(
    dp_size: int, microbatch_size: int, consumed: int, size: int, num_workers: int = 0
) -> list[int]:
    """The samples of one step, put where `first_sample` says."""
    batch = [-1] * size
    for rank in range(dp_size):
        loader = BatchLoader(
            Numbered(),
            dp_rank=rank,
            dp_size=dp_size,
            microbatch_size=microbatch_size,
            num_workers=num_workers,
        )
        for one in loader.fetch(consumed, size // dp_size // microbatch_size):
            assert one.tokens.shape == (microbatch_size, 4)
            first = one.first_sample
            batch[first : first + microbatch_size] = one.tokens[:, 0].tolist()
        loader.close()
    return batch


@pytest.mark.parametrize(("dp_size", "microbatch_size"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("consumed", [0, 5, 80])
def test_every_layout_sees_the_same_global_batch(
    dp_size: int, microbatch_size: int, consumed: int
) -> None:
    batch = global_batch(dp_size, microbatch_size, consumed, 16)
    assert batch == list(range(consumed, consumed + 16))


def test_the_order_within_a_rank_is_the_sequential_samplers() -> None:
    loader = BatchLoader(Numbered(), dp_rank=1, dp_size=2, microbatch_size=3)
    batches = loader.fetch(10, 2)
    assert numbers(batches) == [[13, 14, 15], [19, 20, 21]]
    assert [batch.first_sample for batch in batches] == [3, 9]
    batch = batches[0]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool
    assert batch.labels[:, 0].tolist() == [14, 15, 16]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.labels, batch.labels)
    assert moved.first_sample == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_rewinds_and_resumption(num_workers: int) -> None:
    loader = BatchLoader(
        Numbered(), dp_rank=1, dp_size=2, microbatch_size=2, num_workers=num_workers
    )
    walked = {consumed: numbers(loader.fetch(consumed, 2)) for consumed in range(0, 96, 8)}
    assert walked[8] == [[10, 11], [14, 15]]
    for consumed in (40, 48, 0, 8, 88):  # an evaluation starts over; a resume starts anywhere
        assert numbers(loader.fetch(consumed, 2)) == walked[consumed]
    loader.close()
    fresh = BatchLoader(Numbered(), dp_rank=1, dp_size=2, microbatch_size=2)
    assert numbers(fresh.fetch(48, 2)) == walked[48]
    loader.close()  # a second time is fine


def ramp(consumed: int) -> int:
    return 1 + consumed // 8


@pytest.mark.parametrize("schedule", [ramp, None])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_growing_batch_is_followed(num_workers: int, schedule: object) -> None:
    loader = BatchLoader(
        Numbered(),
        dp_rank=0,
        dp_size=1,
        microbatch_size=2,
        num_workers=num_workers,
        num_microbatches_at=ramp if schedule else None,
    )
    restarts = 0
    restart = loader._restart

    def counted(step: object) -> None:
        nonlocal restarts
        restarts += 1
        restart(step)  # type: ignore[arg-type]

    loader._restart = counted  # type: ignore[method-assign]
    consumed, seen, sizes = 0, [], []
    while consumed + 2 * ramp(consumed) <= 96:
        batches = loader.fetch(consumed, ramp(consumed))
        seen += [i for batch in numbers(batches) for i in batch]
        sizes.append(len(batches))
        consumed += 2 * len(batches)
    loader.close()
    assert seen == list(range(consumed))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 5
    # A schedule keeps prefetching through every change of size; without one, each change restarts.
    assert restarts == (1 if schedule else len(set(sizes)))


def test_the_next_steps_are_loaded_while_the_caller_works() -> None:
    delay, work, steps = 0.02, 0.2, 4
    loader = BatchLoader(
        Numbered(delay=delay), dp_rank=0, dp_size=1, microbatch_size=4, num_workers=2
    )
    loader.fetch(0, 2)
    waited = 0.0
    for step in range(1, steps):
        time.sleep(work)
        start = time.monotonic()
        loader.fetch(8 * step, 2)
        waited += time.monotonic() - start
    loader.close()
    assert waited < (steps - 1) * 8 * delay / 2  # loading takes 8 * delay a step


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_are_raised_in_their_own_words(num_workers: int) -> None:
    loader = BatchLoader(
        Numbered(bad=9), dp_rank=0, dp_size=1, microbatch_size=8, num_workers=num_workers
    )
    loader.fetch(0, 1)
    with pytest.raises(DataError) as caught:
        loader.fetch(8, 1)
    assert str(caught.value) == "sample 9 is damaged"
    with pytest.raises(DataError):  # not the step after it
        loader.fetch(8, 1)
    assert numbers(loader.fetch(16, 1)) == [list(range(16, 24))]
    loader.close()


def test_the_end_of_the_data_is_an_error_that_names_it() -> None:
    loader = BatchLoader(Numbered(20), dp_rank=0, dp_size=2, microbatch_size=4)
    loader.fetch(0, 2)
    with pytest.raises(DataError, match=r"at 16 consumed samples needs samples up to 24.* with 20"):
        loader.fetch(16, 1)


def test_close_ends_the_processes_and_sigterm_does_not() -> None:
    before = set(multiprocessing.active_children())
    loader = BatchLoader(Numbered(), dp_rank=0, dp_size=1, microbatch_size=2, num_workers=2)
    for consumed in (0, 2):  # one answer of each worker: both have come to ignore signals
        loader.fetch(consumed, 1)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    for consumed in range(4, 90, 2):
        loader.fetch(consumed, 1)
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()


def test_no_number_is_drawn_from_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    BatchLoader(Numbered(), dp_rank=0, dp_size=1, microbatch_size=2).fetch(0, 1)
    assert torch.equal(torch.random.get_rng_state(), state)


class Packed(Numbered):
    """Sample i has i documents, but for the last token."""

    def __getitem__(self, index: int) -> Sample:
        bounds = np.array([*range(index), 4], dtype=np.int32)
        return {**super().__getitem__(index), "cu_seqlens": bounds}


@pytest.mark.parametrize(("first", "documents"), [(1, 2), (2, 4), (3, 4)])
def test_bounds_of_documents_are_filled_up(first: int, documents: int) -> None:
    loader = BatchLoader(Packed(5), dp_rank=0, dp_size=1, microbatch_size=1)
    batches = loader.fetch(first, 2)
    for index, batch in enumerate(batches, first):
        assert batch.cu_seqlens is not None
        assert batch.cu_seqlens.dtype == torch.int32
        expected = [*range(index), *[4] * (documents + 1 - index)]
        assert batch.cu_seqlens.tolist() == [expected]
        assert batch.to(torch.device("cpu")).cu_seqlens is not None
    assert (
        BatchLoader(Numbered(), dp_rank=0, dp_size=1, microbatch_size=1).fetch(0, 1)[0].cu_seqlens
        is None
    )
