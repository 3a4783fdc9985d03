from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.buffers import GradBuffers
from core.optim.step import OptimizerStep, StepResult
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block, split_blocks, whole_copy
from core.parallel.placement import initialize_parameters
from core.parallel.random import normal_init
from core.parallel.sharding import Declaration, declare_parameter, declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.distributed import WorkerPool

CPU = torch.device("cpu")
FP64 = PrecisionConfig(dtype="fp64")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}
WEIGHT, NORM = (8, 6), (6,)


class _Run:
    """A column-cut weight and a norm whose gradient comes in parts, with their optimizer."""

    def __init__(
        self, ctx: ParallelContext, config: OptimizerConfig, precision: PrecisionConfig = FP64
    ) -> None:
        self.ctx, self.model = ctx, nn.Module()
        rows, copies = split_blocks([Block(8)], ctx.tp.rank, ctx.tp.size, other=(6,))
        place: dict[str, Any] = {"dtype": DTYPES[precision.dtype], "device": CPU}
        weight = Declaration(WEIGHT, copies, normal_init(0.5))
        declare_parameter(self.model, "weight", (rows, 6), weight, **place)
        norm = Declaration(NORM, whole_copy(NORM, "partial"), normal_init(0.5), weight_decay=False)
        declare_parameter(self.model, "norm", NORM, norm, **place)
        parameters = declared_parameters(self.model)
        initialize_parameters(parameters, seed=3)
        sharing = publish_sharing(parameters, ctx)
        self.buffers = GradBuffers(parameters, ctx, bucket_mib=1)
        self.optimizer = OptimizerStep(self.buffers, sharing, ctx, config, precision)

    def step(self, step: int, factor: float = 1.0, valid: Tensor | None = None) -> StepResult:
        """The gradient is `factor` times the sum of `_gradient` over two microbatches and dp."""
        rows = 8 // self.ctx.tp.size
        first = self.ctx.tp.rank * rows
        factor *= float(self.optimizer.loss_scale.scale)
        self.buffers.begin_step(2)
        for microbatch in range(2):
            index = 2 * self.ctx.dp.rank + microbatch
            weight = _gradient(WEIGHT, step, index)[first : first + rows] * factor
            norm = _gradient(NORM, step, index) * factor / self.ctx.tp.size
            p, q = self.model.get_parameter("weight"), self.model.get_parameter("norm")
            ((p.double() * weight).sum() + (q.double() * norm).sum()).backward()
        return self.optimizer.step(1e-2, 0.1, valid)

    def bits(self) -> list[Tensor]:
        """Copies of all parameters and state."""
        self.buffers.wait_for_parameters()
        state = [s.tensor.clone() for s in self.optimizer.state_tensors()]
        return [*state, *(bucket.values.clone() for bucket in self.buffers.buckets)]

    def gradients_are_zero(self) -> bool:
        return all(torch.count_nonzero(b.main_grad) == 0 for b in self.buffers.buckets)


def _gradient(shape: tuple[int, ...], step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * len(shape) + 10 * step + index)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _single(config: OptimizerConfig, precision: PrecisionConfig = FP64) -> _Run:
    return _Run(ParallelContext.single(), config, precision)


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def _torch_steps(dp: int, clip: float, steps: int) -> tuple[list[Tensor], list[float]]:
    run = _single(OptimizerConfig())
    weight = nn.Parameter(run.model.get_parameter("weight").detach().clone())
    norm = nn.Parameter(run.model.get_parameter("norm").detach().clone())
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    norms = []
    for step in range(steps):
        for parameter in (weight, norm):
            shape = tuple(parameter.shape)
            parameter.grad = torch.stack([_gradient(shape, step, i) for i in range(2 * dp)]).sum(0)
        limit = clip or float("inf")
        norms.append(float(nn.utils.clip_grad_norm_([weight, norm], limit)))
        optimizer.step()
    return [weight.detach(), norm.detach()], norms


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_equals_torch_with_clipping(clip: float) -> None:
    run = _single(OptimizerConfig(clip_grad=clip))
    expected, norms = _torch_steps(1, clip, 3)
    for step in range(3):
        result = run.step(step)
        assert float(result.grad_norm) == pytest.approx(norms[step], rel=1e-12)
        assert bool(result.applied)
        assert run.gradients_are_zero()
    for found, wanted in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-12)


def _steps(tp: int) -> tuple[list[Tensor], list[float]]:
    run = _Run(ParallelContext.create(ParallelConfig(tp=tp), CPU), OptimizerConfig(clip_grad=0.5))
    norms = [float(run.step(step).grad_norm) for step in range(3)]
    assert run.gradients_are_zero()
    run.buffers.wait_for_parameters()
    return [p.detach() for p in run.model.parameters()], norms


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_every_layout_equals_one_process(pool: WorkerPool, tp: int, dp: int) -> None:
    (weight, norm), norms = _torch_steps(dp, 0.5, 3)
    for rank, (found, found_norms) in enumerate(pool.run(_steps, tp * dp, tp)):
        rows = 8 // tp
        first = rank % tp * rows
        assert found_norms == pytest.approx(norms, rel=1e-12)
        torch.testing.assert_close(found[0], weight[first : first + rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1], norm, rtol=1e-12, atol=1e-12)


def _step_with_nan_on_one_rank(tp: int) -> tuple[bool, bool, bool]:
    ctx = ParallelContext.create(ParallelConfig(tp=tp), CPU)
    run = _Run(ctx, OptimizerConfig())
    run.step(0)
    before = run.bits()
    result = run.step(1, factor=float("nan") if ctx.world.rank == ctx.world.size - 1 else 1.0)
    unchanged = _same(before, run.bits())
    return bool(result.applied), unchanged, bool(run.step(2).applied)


@pytest.mark.parametrize(("tp", "dp"), [(2, 1), (1, 2), (2, 2)])
def test_one_rank_with_nan_makes_all_skip(pool: WorkerPool, tp: int, dp: int) -> None:
    results = pool.run(_step_with_nan_on_one_rank, tp * dp, tp)
    assert results == [(False, True, True)] * (tp * dp)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 100.0])
def test_skipped_step_leaves_every_bit(factor: float) -> None:
    run, twin = (_single(OptimizerConfig(spike_factor=5.0)) for _ in range(2))
    for step in range(3):
        run.step(step)
        twin.step(step)
    before = run.bits()
    result = run.step(3, factor)
    assert not bool(result.applied)
    assert _same(before, run.bits())
    assert run.gradients_are_zero()
    assert run.optimizer.state_dict() == twin.optimizer.state_dict()
    assert bool(run.step(4).applied)
    twin.step(4)
    assert _same(run.bits(), twin.bits())


def test_spike_is_measured_against_the_mean_of_accepted_norms() -> None:
    run = _single(OptimizerConfig(spike_factor=2.0))
    norms = [float(run.step(0, factor).grad_norm) for factor in (1.0, 1.5, 1.7)]
    mean = sum(norms) / 3
    assert run.optimizer.state_dict()["mean_grad_norm"] == pytest.approx(mean, rel=1e-12)
    limit = 2.0 * mean / norms[0]
    assert not bool(run.step(0, limit * 1.001).applied)
    assert bool(run.step(0, limit * 0.999).applied)


def test_step_without_valid_tokens_is_skipped() -> None:
    precision = PrecisionConfig(dtype="fp16", initial_loss_scale=8.0, loss_scale_hysteresis=1)
    run = _single(OptimizerConfig(), precision)
    before = run.bits()
    assert not bool(run.step(0, 1.0, torch.tensor(False)).applied)
    assert _same(before, run.bits())
    result = run.step(0, 1.0, torch.tensor(True))
    assert bool(result.applied)
    assert float(result.loss_scale) == 8.0  # nothing to learn is no overflow


def test_loss_scale_changes_no_bit_of_the_update() -> None:
    config = OptimizerConfig(clip_grad=0.5)
    plain, scaled = (
        _single(config, PrecisionConfig(dtype="fp16", initial_loss_scale=scale))
        for scale in (1.0, 2.0**10)
    )
    for step in range(3):
        results = [run.step(step) for run in (plain, scaled)]
        assert float(results[0].grad_norm) == float(results[1].grad_norm)
    assert float(results[1].loss_scale) == 2.0**10
    assert _same(plain.bits(), scaled.bits())


def test_overflow_skips_and_lowers_the_loss_scale() -> None:
    precision = PrecisionConfig(dtype="fp16", initial_loss_scale=2.0**20, loss_scale_hysteresis=1)
    run = _single(OptimizerConfig(), precision)
    before = run.bits()
    scales = []
    for _ in range(12):
        result = run.step(0)
        scales.append(float(result.loss_scale))
        if bool(result.applied):
            break
        assert _same(before, run.bits())
    assert bool(result.applied)
    assert scales == [2.0 ** (20 - n) for n in range(len(scales))]
    assert 3 < len(scales) < 12


def test_state_continues_bit_for_bit() -> None:
    precision = PrecisionConfig(dtype="fp16", initial_loss_scale=8.0, loss_scale_window=2)
    config = OptimizerConfig(spike_factor=10.0)
    run, resumed = _single(config, precision), _single(config, precision)
    for step in range(3):
        run.step(step)
    for ours, theirs in zip(
        resumed.optimizer.state_tensors(), run.optimizer.state_tensors(), strict=True
    ):
        ours.tensor.copy_(theirs.tensor)
    for to, source in zip(resumed.buffers.buckets, run.buffers.buckets, strict=True):
        to.values.copy_(source.values)
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    for step in range(3, 6):
        run.step(step)
        resumed.step(step)
    assert _same(run.bits(), resumed.bits())
    assert run.optimizer.state_dict() == resumed.optimizer.state_dict()
    assert run.optimizer.state_dict()["step_count"] == 6
