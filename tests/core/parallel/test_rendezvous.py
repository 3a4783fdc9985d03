import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from core.errors import TrainingError
from core.parallel.rendezvous import agree_on_name, meet

SOON = timedelta(seconds=20)


def _names(store: HashStore, size: int, late: int | None = None) -> list[str]:
    def rank_of(rank: int) -> str:
        time.sleep(0.3 if rank == late else 0.0)
        return agree_on_name(store, rank, size, SOON)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(rank_of, range(size)))


@pytest.mark.parametrize("late", [None, 0, 2])
def test_each_start_agrees_on_a_name_of_its_own(late: int | None) -> None:
    """Whoever comes first reads what the start before has left."""
    store = HashStore()
    starts = [_names(store, 4, late) for _ in range(3)]
    assert all(len(set(names)) == 1 for names in starts)
    assert len({names[0] for names in starts}) == 3


def test_a_start_that_was_killed_before_all_had_come() -> None:
    store = HashStore()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(agree_on_name, store, 1, 3, SOON)
        with pytest.raises(TrainingError, match=r"1 of 3 ranks did not come .* rank 2"):
            agree_on_name(store, 0, 3, timedelta(seconds=0.5))
    names = _names(store, 3, late=1)
    assert len(set(names)) == 1


def test_a_rank_that_hears_nothing_says_so() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(TrainingError, match="rank 1 heard nothing of rank 0"):
        agree_on_name(store, 1, 2, timedelta(seconds=0.2))


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert meet(SOON) is None
