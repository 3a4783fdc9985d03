import os
from collections.abc import Iterator

import pytest
import torch

from core.testing.distributed import WorkerPool

# Triton reads it as it is imported, which nothing has done yet.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# As the workers of the pool do: small tensors gain nothing from threads, which wait for each other,
# spinning, while other processes want the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Processes for multi-rank tests, started once for the whole session."""
    workers = WorkerPool()
    yield workers
    workers.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    count = torch.cuda.device_count()
    for item in items:
        needed = 2 if item.get_closest_marker("multi_gpu") else 1
        if (item.get_closest_marker("gpu") or needed == 2) and count < needed:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA devices, found {count}"))
