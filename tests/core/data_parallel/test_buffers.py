import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.main_grad import accumulate_product
from core.data_parallel.regions import ALIGNMENT
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.random import normal_init
from core.parallel.sharding import Declaration, declare_parameter, declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.parity import gather_regions

CPU = torch.device("cpu")
MICROBATCHES = 2


class _Accumulate(torch.autograd.Function):
    """`x @ weight.t()` whose backward accumulates in `main_grad` where there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, accumulate_product(weight, grads[0], x)


class _Toy(nn.Module):
    """A tied table used both ways, two linears, a norm without weight decay, and an unused
    weight.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in {
            "table": (10, 6),
            "unused": (3, 5),
            "first": (300, 6),
            "scale": (6,),
            "second": (6, 300),
        }.items():
            declaration = Declaration(
                shape, whole_copy(shape), normal_init(0.1), weight_decay=name != "scale"
            )
            parameter = declare_parameter(self, name, shape, declaration, dtype=dtype, device=CPU)
            nn.init.normal_(parameter, std=0.1)

    def forward(self, tokens: Tensor, skip_first: bool = False) -> Tensor:
        x = self.get_parameter("table")[tokens]
        hidden = x.repeat(1, 50) if skip_first else _Accumulate.apply(x, self.first)
        x = x + _Accumulate.apply(hidden.sin(), self.second) * self.scale
        return _Accumulate.apply(x, self.table).logsumexp(-1).sum()


def _buffers(
    model: nn.Module, ctx: ParallelContext, overlap: bool = True, sharded: bool = True
) -> GradBuffers:
    parameters = declared_parameters(model)
    return GradBuffers(parameters, ctx, bucket_mib=1, sharded=sharded, overlap_reduce=overlap)


def _tokens(step: int, rank: int, microbatch: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + microbatch)
    return torch.randint(10, (7,), generator=generator)


def _plain_gradients(step: int, ranks: int, skip_first_on: int | None = None) -> dict[str, Tensor]:
    model = _Toy(torch.float64)
    for rank in range(ranks):
        for microbatch in range(MICROBATCHES):
            skip = rank == skip_first_on and step > 0
            model(_tokens(step, rank, microbatch), skip_first=skip).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def _run_steps(
    model: nn.Module,
    buffers: GradBuffers,
    ctx: ParallelContext,
    skip_first_on: int | None = None,
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Whole gradients of three steps, and how many buckets had started before `finish`."""
    gradients, started = [], []
    rank, whole = ctx.dp.rank, buffers.counted == ctx.model
    for step in range(3):
        buffers.begin_step(MICROBATCHES)
        for microbatch in range(MICROBATCHES):
            skip = rank == skip_first_on and step > 0
            model(_tokens(step, rank, microbatch), skip_first=skip).backward()
        started.append(buffers._started)
        buffers.finish()
        gradients.append(gather_regions(buffers, ctx))
        for name, parameter in model.named_parameters() if whole else ():
            assert torch.equal(parameter.main_grad, gradients[-1][name])  # type: ignore[attr-defined]
        buffers.zero()
        _poison(model, buffers)
    return gradients, started


def _poison(model: nn.Module, buffers: GradBuffers) -> None:
    """Make stale gradients NaN; everything else must be zero, gaps and padding too."""
    loose: dict[str, Any] = dict(model.named_parameters())
    used = {name for name, p in loose.items() if p.stale}
    assert used >= {"table", "second"}
    assert used.isdisjoint({"unused", "scale"})
    for name in used:
        loose[name].main_grad.zero_()
    assert all(torch.count_nonzero(b.main_grad) == 0 for b in buffers.buckets)
    for name in used:
        loose[name].main_grad.fill_(math.nan)


def test_buckets_hold_parameters_in_reverse_order_aligned_with_zero_gaps() -> None:
    model, before = _Toy(), _Toy().state_dict()
    buffers = _buffers(model, ParallelContext.single())
    names = [[slot.sharding.name for slot in bucket.slots] for bucket in buffers.buckets]
    assert names == [["scale"], ["second", "first", "unused", "table"]]
    assert [bucket.weight_decay for bucket in buffers.buckets] == [False, True]
    for bucket in buffers.buckets:
        held = torch.zeros_like(bucket.values, dtype=torch.bool)
        for slot in bucket.slots:
            assert slot.start % ALIGNMENT == 0
            parameter = model.get_parameter(slot.sharding.name)
            assert parameter.data_ptr() == bucket.values[slot.start :].data_ptr()
            assert torch.equal(parameter, before[slot.sharding.name])
            slot.view(held).fill_(True)
        assert torch.count_nonzero(bucket.values[~held]) == 0


def test_bucket_size_dtype_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"a": _Toy(torch.bfloat16), "b": _Toy(torch.float64)})
    model["a"].get_parameter("unused").requires_grad_(False)
    buffers = _buffers(model, ParallelContext.single())
    assert {b.values.dtype: b.main_grad.dtype for b in buffers.buckets} == {
        torch.bfloat16: torch.float32,
        torch.float64: torch.float64,
    }
    assert all(len({s.sharding.name[0] for s in b.slots}) == 1 for b in buffers.buckets)
    assert not hasattr(model["a"].get_parameter("unused"), "main_grad")
    with pytest.raises(ValueError, match=r"a.table already has a gradient buffer"):
        _buffers(model, ParallelContext.single())


def test_large_parameters_are_put_in_their_own_bucket() -> None:
    model = nn.Module()
    for name, rows in (("a", 8), ("big", 3000), ("b", 1024), ("c", 1000), ("d", 40)):
        declaration = Declaration((rows, 128), whole_copy((rows, 128)), normal_init(1.0))
        declare_parameter(model, name, (rows, 128), declaration, dtype=torch.float32, device=CPU)
    buffers = _buffers(model, ParallelContext.single())  # 1 MiB: 2048 rows of 128
    names = [[slot.sharding.name for slot in bucket.slots] for bucket in buffers.buckets]
    assert names == [["d", "c"], ["b"], ["big"], ["a"]]


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_are_those_of_autograd(overlap: bool) -> None:
    model = _Toy(torch.float64)
    ctx = ParallelContext.single()
    gradients, started = _run_steps(model, _buffers(model, ctx, overlap), ctx)
    for step, found in enumerate(gradients):
        expected = _plain_gradients(step, 1)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())
    assert started == ([0, 2, 2] if overlap else [0, 0, 0])


def test_gradient_after_the_reduction_names_the_parameter() -> None:
    model = _Toy()
    buffers = _buffers(model, ParallelContext.single())
    for _ in range(2):
        buffers.begin_step(1)
        model(_tokens(0, 0, 0)).backward()
        if buffers._started == 0:  # the first step, which records
            buffers.finish()
            buffers.zero()
    used_more_often = model(_tokens(0, 0, 0))
    with pytest.raises(RuntimeError, match="table: a gradient arrived after the reduction"):
        used_more_often.backward()


def test_gradient_after_finish_names_the_parameter() -> None:
    model = _Toy()
    buffers = _buffers(model, ParallelContext.single(), overlap=False)
    buffers.begin_step(1)
    buffers.finish()
    with pytest.raises(RuntimeError, match=r"table: a gradient arrived after"):
        model(_tokens(0, 0, 0)).backward()
    buffers.zero()
    model(_tokens(0, 0, 0)).backward()


def _train(
    overlap: bool, sharded: bool, dtype: torch.dtype, skip_first_on: int | None
) -> tuple[list[dict[str, Tensor]], list[int]]:
    ctx = ParallelContext.create(ParallelConfig(), CPU)
    model = _Toy(dtype)
    return _run_steps(model, _buffers(model, ctx, overlap, sharded), ctx, skip_first_on)


@pytest.mark.parametrize("skip_first_on", [None, 1])
@pytest.mark.parametrize(("sharded", "dp"), [(True, 2), (True, 3), (False, 2)])
def test_sum_over_ranks_is_right(
    pool: WorkerPool, sharded: bool, dp: int, skip_first_on: int | None
) -> None:
    """The second case leaves a weight unused on one rank from the second step on."""
    results = pool.run(_train, dp, True, sharded, torch.float64, skip_first_on)
    for gradients, _ in results:
        for step, found in enumerate(gradients):
            expected = _plain_gradients(step, dp, skip_first_on)
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    assert results[0][1] == [0, 2, 2]
    assert results[1][1] == ([0, 2, 2] if skip_first_on is None else [0, 1, 1])


@pytest.mark.parametrize("sharded", [True, False])
def test_overlap_changes_no_bit(pool: WorkerPool, sharded: bool) -> None:
    results = [
        pool.run(_train, 2, overlap, sharded, torch.float32, None) for overlap in (True, False)
    ]
    first = results[0][0][0]
    for gradients, _ in (*results[0], *results[1]):
        for step, found in enumerate(gradients):
            for name in found:
                assert torch.equal(found[name], first[step][name])


def test_microbatches_of_a_step_may_change_and_interleave() -> None:
    """A bucket starts when all gradients of the step have come, in whatever order."""
    model = _Toy(torch.float64)
    buffers = _buffers(model, ParallelContext.single())
    for microbatches in (2, 3, 1):
        buffers.begin_step(microbatches)
        losses = [model(_tokens(0, 0, m)) for m in range(microbatches)]
        started = []
        for loss in reversed(losses):
            started.append(buffers._started)
            loss.backward()
        assert set(started) == {0}
        assert buffers._started == (0 if microbatches == 2 else 2)
        buffers.finish()
        buffers.zero()


def test_a_parameter_used_in_some_microbatches_only_is_reduced_at_the_end() -> None:
    model = _Toy(torch.float64)
    buffers = _buffers(model, ParallelContext.single())
    for step in range(2):
        buffers.begin_step(2)
        for microbatch in range(2):
            model(_tokens(step, 0, microbatch), skip_first=microbatch == 0).backward()
        assert buffers._started == step  # the bucket of `scale`
        buffers.finish()
        buffers.zero()


def test_what_other_stages_hold_has_a_bucket_of_its_own() -> None:
    model = nn.Module()
    for name in ("a", "shared", "b"):
        declaration = Declaration(
            (4,), whole_copy((4,), "partial"), normal_init(1.0), across_stages=name == "shared"
        )
        declare_parameter(model, name, (4,), declaration, dtype=torch.float32, device=CPU)
    buffers = _buffers(model, ParallelContext.single())
    names = [[slot.sharding.name for slot in bucket.slots] for bucket in buffers.buckets]
    assert names == [["shared"], ["b", "a"]]
