from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.buffers import GradBuffers
from core.optim.adamw import AdamW, update_
from core.optim.rounding import round_master
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.random import normal_init
from core.parallel.sharding import Declaration, declare_parameter, declared_parameters

SHAPES = {"big": (300, 301), "bias": (7,), "small": (3, 5), "scalar": ()}
BETAS, EPS = (0.9, 0.95), 1e-8
WIDE = PrecisionConfig()


def _make(
    dtype: torch.dtype, device: str = "cpu", precision: PrecisionConfig = WIDE
) -> tuple[nn.Module, GradBuffers, AdamW]:
    torch.manual_seed(0)
    model = nn.Module()
    for name, shape in SHAPES.items():
        declaration = Declaration(
            shape, whole_copy(shape), normal_init(1.0), weight_decay=name != "bias"
        )
        place: dict[str, Any] = {"dtype": dtype, "device": torch.device(device)}
        parameter = declare_parameter(model, name, shape, declaration, **place)
        parameter.data.copy_(torch.randn(shape))
    ctx = ParallelContext.single(device)
    buffers = GradBuffers(declared_parameters(model), ctx, bucket_mib=1)
    config = OptimizerConfig(betas=BETAS, eps=EPS)
    return model, buffers, AdamW(buffers.regions, ctx.device, config, precision)


def _gradient(name: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * len(name) + step)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def _set_gradients(model: nn.Module, step: int) -> None:
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(_gradient(name, step))  # type: ignore[attr-defined]


def _step(optimizer: AdamW, step: int, *, apply: bool = True, scale: float = 1.0) -> None:
    device = optimizer.step_count.device
    optimizer.step(
        lr=1e-3 * (step + 1),
        weight_decay=0.1 + 0.01 * step,
        grad_scale_inverse=torch.full((), scale, device=device),
        clip_coefficient=torch.full((), 0.7, device=device),
        apply=torch.full((), apply, device=device),
    )


def _reference(dtype: torch.dtype, steps: int) -> dict[str, Tensor]:
    model, _, _ = _make(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    parameters = {n: nn.Parameter(p.detach().to(wide)) for n, p in model.named_parameters()}
    optimizers = [
        torch.optim.AdamW([p], betas=BETAS, eps=EPS, foreach=False) for p in parameters.values()
    ]
    for step in range(steps):
        for (name, parameter), optimizer in zip(parameters.items(), optimizers, strict=True):
            parameter.grad = (_gradient(name, step) * 0.7).to(wide)
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            decay = 0.1 + 0.01 * step if name != "bias" else 0.0
            optimizer.param_groups[0]["weight_decay"] = decay
            optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    model, buffers, optimizer = _make(dtype)
    for step in range(5):
        _set_gradients(model, step)
        _step(optimizer, step)
    for name, expected in _reference(dtype, 5).items():
        _close(model.get_parameter(name).detach(), expected, tolerance)
    for bucket, slot in buffers.slots():
        gap = bucket.values[slot.start + slot.numel : slot.end]
        assert torch.count_nonzero(gap) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_a_wide_master(dtype: torch.dtype) -> None:
    model, _, optimizer = _make(dtype)
    for step in range(5):
        _set_gradients(model, step)
        _step(optimizer, step)
    masters = {s.fragment.name: s.tensor for s in optimizer.state_tensors() if s.name == "master"}
    for name, expected in _reference(dtype, 5).items():
        _close(masters[name], expected, 1e-6)
        assert torch.equal(model.get_parameter(name), round_master(masters[name], dtype))
        nearest = masters[name].to(dtype)  # ties apart
        assert (model.get_parameter(name) != nearest).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_step_that_is_not_applied_leaves_every_bit(dtype: torch.dtype) -> None:
    model, buffers, optimizer = _make(dtype)
    _set_gradients(model, 0)
    _step(optimizer, 0)
    kept = [s.tensor.clone() for s in optimizer.state_tensors()]
    values = [bucket.values.clone() for bucket in buffers.buckets]
    for bucket in buffers.buckets:
        bucket.main_grad.fill_(float("nan"))
    _step(optimizer, 1, apply=False, scale=float("inf"))
    assert all(map(torch.equal, kept, (s.tensor for s in optimizer.state_tensors())))
    assert all(map(torch.equal, values, (bucket.values for bucket in buffers.buckets)))
    assert int(optimizer.step_count) == 1


def test_state_tensors_are_views_shaped_like_parameters() -> None:
    model, _, optimizer = _make(torch.float32)
    states = list(optimizer.state_tensors())
    assert {(s.name, s.fragment.name) for s in states} == {
        (state, name) for state in ("exp_avg", "exp_avg_sq") for name in SHAPES
    }
    assert all(s.tensor.shape == SHAPES[s.fragment.name] for s in states)
    for state in states:
        state.tensor.fill_(1.0)
    _set_gradients(model, 0)
    _step(optimizer, 0, scale=0.0)
    assert all(torch.all(s.tensor < 1.0) and torch.all(s.tensor > 0.8) for s in states)


def test_master_is_refreshed_from_loaded_parameters() -> None:
    model, _, optimizer = _make(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(3.0)
    optimizer.refresh_master_from_parameters()
    masters = [s.tensor for s in optimizer.state_tensors() if s.name == "master"]
    assert len(masters) == len(SHAPES)
    assert all(torch.all(master == 3.0) for master in masters)
    assert all(master.dtype == torch.float32 for master in masters)


def test_kernel_is_one_graph_for_all_sizes_and_numbers() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    kernel: Any = update_
    compiled = torch.compile(kernel.__wrapped__, backend=counter, fullgraph=True)
    for rows in (4, 9, 300):
        tensors = [torch.rand(rows, 128) for _ in range(4)]
        values = torch.rand(rows, 128).bfloat16()
        plain = [x.clone() for x in (*tensors, values)]
        for x in (*tensors, values):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        scalars = torch.rand(8) * rows / 300
        apply = torch.tensor(rows != 9)
        compiled(*tensors, values, scalars, apply, None)
        kernel(*plain, scalars, apply, None)
        for found, expected in zip((*tensors, values), plain, strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cuda_equals_cpu_without_waiting(dtype: torch.dtype) -> None:
    found, expected = _make(dtype, "cuda"), _make(dtype)
    for step in range(4):
        for model, _, optimizer in (found, expected):
            _set_gradients(model, step)
            if step == 1:  # compiled by now
                torch.cuda.set_sync_debug_mode("error")
            try:
                _step(optimizer, step, apply=step != 2)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for ours, theirs in zip(found[2].state_tensors(), expected[2].state_tensors(), strict=True):
        _close(ours.tensor.cpu(), theirs.tensor, tolerance)
