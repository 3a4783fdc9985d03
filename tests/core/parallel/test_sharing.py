import pytest
import torch
from torch import nn

from core.config.parallel import ParallelConfig
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.random import normal_init
from core.parallel.sharding import Declaration, declare_parameter, declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.distributed import WorkerPool

CPU = torch.device("cpu")


def test_boxes_that_leave_a_hole_are_refused() -> None:
    model = nn.Module()
    declaration = Declaration((4, 3), whole_copy((3, 3)), normal_init(1.0))
    declare_parameter(model, "w", (3, 3), declaration, dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match=r"w: the boxes of all ranks have 9 elements .* has 12"):
        publish_sharing(declared_parameters(model), ParallelContext.single())


def _publish_two_kinds() -> str:
    ctx = ParallelContext.create(ParallelConfig(tp=2), CPU)
    model = nn.Module()
    copies = whole_copy((3,), "same" if ctx.tp.rank == 0 else "partial")
    declaration = Declaration((3,), copies, normal_init(1.0))
    declare_parameter(model, "w", (3,), declaration, dtype=torch.float32, device=CPU)
    try:
        publish_sharing(declared_parameters(model), ctx)
    except ValueError as error:
        return str(error)
    return ""


def test_holders_must_declare_one_gradient_kind(pool: WorkerPool) -> None:
    message = "w: its holders disagree on its shape or gradient kind"
    assert pool.run(_publish_two_kinds, 2) == [message] * 2
