import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.main_grad import (
    accumulate_gradient,
    accumulate_product,
    accumulate_rows,
    accumulate_sum,
    expire,
    settle,
)
from core.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import ZEROS
from core.parallel.recompute import recomputed
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.layouts import randomize

V, H, F = 10, 6, 8
TOKENS = torch.tensor([[1, 2, 2, 9], [0, 9, 1, 1]])


class _Model(nn.Module):
    """A tied table, two linear layers and biases: everything that accumulates by itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        place = Placement(ParallelContext.single(), dtype, torch.device("cpu"))
        self.table = VocabParallelEmbedding(place, V, H, init=ZEROS)
        self.fc1 = ColumnParallelLinear(place, H, [Block(F)], init=ZEROS, bias=True)
        self.fc2 = RowParallelLinear(place, Block(F), H, init=ZEROS)
        self.head = VocabParallelHead(place, V, H, init=ZEROS, tied_to=self.table)
        randomize(declared_parameters(self))

    def forward(self, tokens: Tensor, *, recompute: bool = False) -> Tensor:
        def mlp(x: Tensor) -> Tensor:
            out: Tensor = self.fc2(self.fc1(x).tanh())
            return out

        x = self.table(tokens).tanh()
        hidden = recomputed(mlp, x) if recompute else mlp(x)
        return self.head(hidden)[..., :V].sin().sum()


class _Ready:
    """Counts `grad_ready` calls, and sees what had been accumulated at each."""

    def __init__(self, parameter: Any) -> None:
        self.count = 0
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        parameter.main_grad = torch.zeros_like(parameter, dtype=dtype)
        parameter.grad_ready = self

    def __call__(self) -> None:
        self.count += 1


def _with_main_grad(model: nn.Module) -> dict[str, _Ready]:
    return {name: _Ready(parameter) for name, parameter in model.named_parameters()}


def _main_grads(model: nn.Module) -> dict[str, Tensor]:
    loose: dict[str, Any] = dict(model.named_parameters())
    return {name: parameter.main_grad for name, parameter in loose.items()}


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_land_in_main_grad(recompute: bool) -> None:
    plain, model = _Model(torch.float64), _Model(torch.float64)
    ready = _with_main_grad(model)
    for microbatch in (1, 2):
        plain(TOKENS * microbatch % V).backward()
        model(TOKENS * microbatch % V, recompute=recompute).backward()
        # The tied table is used twice in each.
        assert {name: r.count for name, r in ready.items()} == {
            "table.weight": 2 * microbatch,
            "fc1.weight": microbatch,
            "fc1.bias": microbatch,
            "fc2.weight": microbatch,
        }
        assert all(parameter.grad is None for parameter in model.parameters())
        expected = {name: p.grad for name, p in plain.named_parameters()}
        for name, main_grad in _main_grads(model).items():
            grad = expected[name]
            assert grad is not None
            assert bool(grad.any())
            torch.testing.assert_close(main_grad, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["table.weight", "fc1.weight", "fc1.bias", "fc2.weight"])
def test_frozen_weights_get_nothing(frozen: str) -> None:
    model = _Model(torch.float64)
    ready = _with_main_grad(model)
    dict(model.named_parameters())[frozen].requires_grad_(False)
    model(TOKENS).backward()
    for name, main_grad in _main_grads(model).items():
        assert (ready[name].count == 0) == (name == frozen)
        assert bool(main_grad.any()) == (name != frozen)
    assert all(parameter.grad is None for parameter in model.parameters())


def _ones(out: Tensor | None) -> Tensor:
    """A product, `[3, 2]`."""
    ones = torch.ones(3, 2, dtype=torch.bfloat16)
    return ones if out is None else out.copy_(ones)


def _add_ones(total: Tensor) -> None:
    total += 1


def test_ready_is_said_after_the_sum() -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    seen: list[float] = []
    loose: Any = weight
    loose.main_grad = torch.zeros(3, 2)
    loose.grad_ready = lambda: seen.append(loose.main_grad.sum().item())
    assert accumulate_product(weight, torch.ones(4, 3), torch.ones(4, 2)) is None
    assert accumulate_rows(weight, torch.tensor([0, 2]), torch.ones(2, 2)) is None
    assert accumulate_sum(weight, torch.ones(5, 3, 2)) is None
    assert accumulate_gradient(weight, _ones, _add_ones) is None
    assert seen == [24.0, 28.0, 58.0, 64.0]


def test_without_main_grad_gradients_are_returned() -> None:
    weight, bias = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))
    dy, x = torch.randn(4, 3), torch.randn(4, 2)
    product = accumulate_product(weight, dy, x)
    assert product is not None
    torch.testing.assert_close(product, dy.t() @ x)
    rows = accumulate_rows(weight, torch.tensor([2, 0, 2, 2]), x)
    assert rows is not None
    torch.testing.assert_close(rows, torch.stack((x[1], torch.zeros(2), x[0] + x[2] + x[3])))
    assert accumulate_gradient(weight, lambda out: product, _add_ones) is product
    total = accumulate_sum(bias, dy)
    assert total is not None
    torch.testing.assert_close(total, dy.sum(0))


def test_bf16_weights_accumulate_in_fp32() -> None:
    """Sixty microbatches: bf16 sums lose what is small beside them, fp32 sums do not."""
    model, plain, exact = (_Model(d) for d in (torch.bfloat16, torch.bfloat16, torch.float64))
    exact.load_state_dict(model.state_dict())
    plain.load_state_dict(model.state_dict())
    _with_main_grad(model)
    _with_main_grad(exact)
    for microbatch in range(60):
        tokens = (TOKENS + microbatch) % V
        for each in (model, plain, exact):
            each(tokens).backward()
    for name, truth in _main_grads(exact).items():
        scale = truth.abs().max()
        main_grad = _main_grads(model)[name]
        grad = dict(plain.named_parameters())[name].grad
        assert main_grad.dtype == torch.float32
        assert grad is not None
        error = ((main_grad - truth).abs().max() / scale).item()
        bf16_error = ((grad - truth).abs().max() / scale).item()
        assert error < 0.6 * bf16_error, (name, error, bf16_error)
        assert error < 0.01


def _poisoned() -> Any:
    """A weight whose gradient is stale, and NaN."""
    weight: Any = nn.Parameter(torch.zeros(3, 2))
    weight.main_grad, weight.grad_ready = torch.zeros(3, 2), lambda: None
    accumulate_product(weight, torch.ones(4, 3), torch.ones(4, 2))
    expire(weight)
    weight.main_grad.fill_(math.nan)
    return weight


def test_what_comes_first_to_a_stale_gradient_replaces_it() -> None:
    weight, ones = _poisoned(), torch.ones(4, 2)
    accumulate_product(weight, torch.ones(4, 3), ones)
    assert torch.equal(weight.main_grad, torch.full((3, 2), 4.0))
    accumulate_product(weight, torch.ones(4, 3), ones)
    assert torch.equal(weight.main_grad, torch.full((3, 2), 8.0))
    weight = _poisoned()
    accumulate_product(weight, torch.ones(0, 3), ones[:0])  # no tokens
    assert not weight.main_grad.any()
    weight = _poisoned()
    for total in (1.0, 2.0):
        accumulate_gradient(weight, _ones, _add_ones)
        assert torch.equal(weight.main_grad, torch.full((3, 2), total))
    expire(weight)
    assert weight.stale
    weight = _poisoned()
    accumulate_rows(weight, torch.tensor([1, 1]), ones[:2])
    assert weight.main_grad.tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    weight = _poisoned()
    accumulate_sum(weight, torch.ones(5, 3, 2))
    assert torch.equal(weight.main_grad, torch.full((3, 2), 5.0))
    weight = _poisoned()
    settle(weight)
    assert not weight.main_grad.any()
    settle(weight)


def test_a_gradient_of_other_origin_is_cleared_at_once() -> None:
    """Whoever adds to `main_grad` by itself finds it zero."""
    weight: Any = nn.Parameter(torch.zeros(3, 2))
    weight.main_grad, weight.grad_ready = torch.full((3, 2), math.nan), lambda: None
    expire(weight)
    assert not weight.main_grad.any()


@pytest.mark.parametrize("put_off", [False, True])
def test_a_skipped_step_leaves_nothing_behind(put_off: bool) -> None:
    """NaN in every gradient, then a step in which one weight gets none, and another."""
    results = []
    for broken in (False, True):
        model, ctx = _Model(torch.float64), ParallelContext.single()
        parameters = declared_parameters(model)
        buffers = GradBuffers(parameters, ctx, bucket_mib=1)
        sharing = publish_sharing(parameters, ctx)
        config = OptimizerConfig(clip_grad=0.0)
        optimizer = OptimizerStep(buffers, sharing, ctx, config, PrecisionConfig(dtype="fp64"))
        for kind in (
            ("whole", "broken", "head alone", "whole")
            if broken
            else (("whole", "head alone", "whole"))
        ):
            buffers.begin_step(1)
            loss = model.head(model.table(TOKENS)).sin().sum()
            if kind != "head alone":
                loss = model(TOKENS) * (math.nan if kind == "broken" else 1.0)
            if put_off:
                with buffers.deferred.collect() as products:
                    loss.backward()
                with torch.no_grad():
                    for product in products:
                        product()
            else:
                loss.backward()
            applied = optimizer.step(1e-2, 0.1).applied
            assert bool(applied) == (kind != "broken")
            if kind == "broken":
                assert buffers.buckets[-1].main_grad.isnan().any()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
