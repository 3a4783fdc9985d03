import torch
from torch import nn

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.derived import StepCache, derived
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.random import ZEROS
from core.parallel.sharding import Declaration, declare_parameter, declared_parameters


def test_kept_while_open_only() -> None:
    cache, made = StepCache(), list[None]()
    one, other = (nn.Parameter(torch.zeros(2)) for _ in range(2))

    def make() -> int:
        made.append(None)
        return len(made)

    assert [cache.get(one, make), cache.get(one, make)] == [1, 2]
    cache.open()
    assert [cache.get(one, make), cache.get(other, make), cache.get(one, make)] == [3, 4, 3]
    cache.open()  # the next step
    assert cache.get(one, make) == 5
    cache.close()
    assert [cache.get(one, make), cache.get(one, make)] == [6, 7]


def test_buffers_keep_from_the_start_of_a_step_to_its_finish() -> None:
    module = nn.Module()
    declaration = Declaration((4,), whole_copy((4,)), ZEROS)
    device = torch.device("cpu")
    weight = declare_parameter(
        module, "weight", (4,), declaration, dtype=torch.float32, device=device
    )

    def double() -> torch.Tensor:
        return derived(weight, lambda: weight.detach() * 2)

    assert double() is not double()  # a parameter in no buffer
    ctx, config = ParallelContext.single(), ParallelConfig()
    buffers = GradBuffers(declared_parameters(module), ctx, config.bucket_mib)
    for step in range(3):
        # Loaded, evaluated, updated: nothing is kept outside of a step.
        buffers.regions[0].values.fill_(step)
        assert double() is not double()
        assert double().tolist() == [2.0 * step] * 4
        buffers.begin_step(2)
        first = double()
        assert double() is first
        assert first.tolist() == [2.0 * step] * 4
        buffers.finish()
        assert double() is not double()
        buffers.zero()
        assert double() is not double()
