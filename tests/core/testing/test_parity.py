import pytest
import torch

from core.config.parallel import ParallelConfig
from core.errors import TrainingError
from core.layers.norm import RMSNorm
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.parity import check_copies_agree


def _compare_copies(tp: int, spoiled: int | None) -> str:
    ctx = ParallelContext.create(ParallelConfig(tp=tp), torch.device("cpu"))
    norm = RMSNorm(Placement(ctx, torch.float64, ctx.device), 7, 1e-5)  # whole on every rank
    initialize_parameters(declared_parameters(norm), seed=1)
    if ctx.world.rank == spoiled:
        norm.weight.data[3] += 1e-15
    try:
        check_copies_agree(declared_parameters(norm), ctx)
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("tp", "world"), [(2, 2), (1, 2), (2, 4)])
def test_copies_are_compared(pool: WorkerPool, tp: int, world: int) -> None:
    assert pool.run(_compare_copies, world, tp, None) == [""] * world
    messages = pool.run(_compare_copies, world, tp, world - 1)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"weight: ranks 0 and {world - 1} hold different numbers")
