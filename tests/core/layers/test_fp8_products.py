"""Linear layers in FP8: against products of dequantised matrices, at every layout, and what they
keep and quantise."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.errors import ConfigError
from core.kernels import elementwise
from core.kernels.fp8 import (
    E4M3,
    E5M2,
    quantize,
    quantize_both,
    scale_of_whole,
    scales_of_columns,
    scales_of_rows,
)
from core.layers import fp8_products
from core.layers.fp8_products import Fp8Products
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.products import PLAIN, Products
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import ZEROS, Init
from core.parallel.recompute import recomputed
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.layouts import LayerCase, randomize, run_case
from core.testing.parity import assert_close

CPU = torch.device("cpu")
S, B, H = 8, 4, 64
RECIPES = pytest.mark.parametrize(
    "recipe", [Fp8Products(), Fp8Products(by_row=True)], ids=["current", "rowwise"]
)


def _place(dtype: torch.dtype) -> Placement:
    return Placement(ParallelContext.single(), dtype, CPU)


def _column(
    recipe: Products, dtype: torch.dtype = torch.float64, bias: bool = True
) -> ColumnParallelLinear:
    module = ColumnParallelLinear(
        _place(dtype), H, [Block(32), Block(16)], init=ZEROS, bias=bias, products=recipe
    )
    randomize(declared_parameters(module), init=Init("normal", 0.3))
    return module


def _x(*shape: int, seed: int = 0) -> Tensor:
    """Some features are far larger than others, as in trained models."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.logspace(-2, 1, shape[-1], dtype=torch.float64)


def _rounded(x: Tensor, dtype: torch.dtype, recipe: Fp8Products, dim: int) -> Tensor:
    """The values that FP8 leaves of a matrix for a product that sums over `dim`."""
    scale = scale_of_whole(x, dtype)
    if recipe.by_row:
        scale = scales_of_rows(x, dtype) if dim == 1 else scales_of_columns(x, dtype)
    return quantize(x, scale, dtype).double() * scale.double()


@RECIPES
def test_products_of_rounded_matrices(recipe: Fp8Products) -> None:
    module = _column(recipe)
    assert module.bias is not None
    x = _x(S, B, H).requires_grad_()
    y = module(x)
    dy = _x(*y.shape, seed=1)
    y.backward(dy)
    flat, weight, dflat = x.detach().flatten(0, 1), module.weight.detach(), dy.flatten(0, 1)
    expected = _rounded(flat, E4M3, recipe, 1) @ _rounded(weight, E4M3, recipe, 1).t()
    dx = _rounded(dflat, E5M2, recipe, 1) @ _rounded(weight, E4M3, recipe, 0)
    dw = _rounded(dflat, E5M2, recipe, 0).t() @ _rounded(flat, E4M3, recipe, 0)
    for found, wanted, what in (
        (y, (expected + module.bias).view_as(y), "output"),
        (x.grad, dx.view_as(x), "input gradient"),
        (module.weight.grad, dw, "weight gradient"),
        (module.bias.grad, dflat.sum(0), "bias gradient"),
    ):
        assert found is not None
        assert_close(found, wanted, 1e-12, what)


@RECIPES
def test_bf16_layer_in_fp8_is_near_that_without(recipe: Fp8Products) -> None:
    found = []
    for each in (recipe, PLAIN):
        module = _column(each, torch.bfloat16, bias=False)
        x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(2)).bfloat16()
        x.requires_grad_()
        y = module(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16())
        found.append([y.detach(), x.grad, module.weight.grad])
    # E4M3 rounds by at most 6 %, E5M2 by 12 %, at random.
    for low, high, limit in zip(*found, (0.05, 0.09, 0.09), strict=True):
        assert low is not None
        assert high is not None
        assert low.dtype == torch.bfloat16
        error = ((low - high).float().norm() / high.float().norm()).item()
        assert 0.0 < error < limit, error


# ---- Layouts -------------------------------------------------------------------------------------


def _column_case(recipe: Products) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        blocks = [Block(4, 8), Block(4, 8)]
        module = ColumnParallelLinear(place, H, blocks, init=ZEROS, bias=True, products=recipe)
        copies = declared_parameters(module)["weight"].sharding.copies
        return LayerCase(module, module, ((_x(S, B, H), "sequence"),), copies)

    return build


def _row_case(recipe: Products) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = RowParallelLinear(place, Block(4, 16), 48, init=ZEROS, bias=True, products=recipe)
        return LayerCase(module, module, ((_x(S, B, 64), "last"),))

    return build


CASES = {
    f"{shape}, {name}": build(recipe)
    for name, recipe in (("current", Fp8Products()), ("rowwise", Fp8Products(by_row=True)))
    for shape, build in (("column", _column_case), ("row", _row_case))
}


def _run_all(ctx: ParallelContext) -> dict[str, dict[str, Tensor]]:
    place = Placement(ctx, torch.float64, CPU)
    return {name: run_case(build(place), ctx) for name, build in CASES.items()}


def _run_rank(tp: int, sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    config = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    return _run_all(ParallelContext.create(config, CPU))


@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(2, False), (2, True), (4, False), (4, True)]
)
def test_every_layout_rounds_alike(pool: WorkerPool, tp: int, sequence_parallel: bool) -> None:
    """The scales of one process, so its numbers: a scale of one rank's own would be off by
    percents."""
    expected = _run_all(ParallelContext.single())
    for actual in pool.run(_run_rank, tp, tp, sequence_parallel):
        for name, results in expected.items():
            assert actual[name].keys() == results.keys()
            for what, tensor in results.items():
                assert_close(actual[name][what], tensor, 1e-12, f"{name}: {what}")


# ---- What is quantised and kept ------------------------------------------------------------------


class _Counter:
    """Counts the weights that are quantised (activations have other shapes)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0

        def counted(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            self.count += x.shape == (48, H)
            return quantize_both(x, *args)

        monkeypatch.setattr(fp8_products, "quantize_both", counted)


@RECIPES
@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_is_quantised_once_a_step(
    recipe: Fp8Products, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = _Counter(monkeypatch)
    module, fresh = _column(recipe, bias=False), _column(recipe, bias=False)
    buffers = GradBuffers(declared_parameters(module), ParallelContext.single(), 1)
    for step in range(2):
        buffers.begin_step(3)
        before = counter.count
        for microbatch in range(3):
            x = _x(S, B, H, seed=microbatch).requires_grad_()
            (recomputed(module, x) if recompute else module(x)).square().sum().backward()
        assert counter.count == before + 1
        buffers.finish()
        with torch.no_grad():
            buffers.regions[0].values.add_(0.1)  # the optimizer
            fresh.weight.add_(0.1)
        buffers.zero()
        # Evaluation sees the new weight, and so does the next step.
        with torch.no_grad():
            x = _x(S, B, H, seed=step + 7)
            assert torch.equal(module(x), fresh(x))


@RECIPES
def test_keeps_a_byte_for_each_input(recipe: Fp8Products) -> None:
    module = _column(recipe, torch.bfloat16, bias=False)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x = _x(S, B, H).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(x)
        data = [x for x in kept if x.numel() == S * B * H]
        assert [x.dtype for x in data] == [E4M3]
        assert sum(x.nbytes for x in kept) <= S * B * H + 4 * H
        kept.clear()
        module.weight.requires_grad_(False)
        module(x)
        assert not kept


@RECIPES
def test_a_weight_gradient_may_be_put_off(recipe: Fp8Products) -> None:
    grads = []
    for later in (False, True):
        module = _column(recipe, bias=False)
        buffers = GradBuffers(declared_parameters(module), ParallelContext.single(), 1)
        buffers.begin_step(1)
        x = _x(S, B, H).requires_grad_()
        y = module(x).square().sum()
        if later:
            with buffers.deferred.collect() as put_off:
                y.backward()
            assert not bool(buffers.buckets[0].main_grad.any())
            for product in put_off:
                product()
        else:
            y.backward()
        grads.append(buffers.buckets[0].main_grad.clone())
    assert bool(grads[0].any())
    assert torch.equal(*grads)


@RECIPES
def test_any_number_of_tokens_without_gradients(recipe: Fp8Products) -> None:
    module = _column(recipe, bias=False)
    x = _x(5, 1, H)
    with torch.no_grad():
        found = module(x)
    expected = (
        _rounded(x[:, 0], E4M3, recipe, 1) @ _rounded(module.weight.detach(), E4M3, recipe, 1).t()
    )
    assert_close(found[:, 0], expected, 1e-12, "output")


def test_maxima_come_from_the_kernels_that_wrote_the_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A norm, two linear layers and SwiGLU between them: scales need no read of the norm's output,
    of SwiGLU's and of its gradient, and the results are the same to the bit."""
    pytest.importorskip("triton")
    monkeypatch.setattr(elementwise, "has_triton_twin", lambda x: True)
    place, init = _place(torch.float32), Init("normal", 0.3)
    first = ColumnParallelLinear(
        place, H, [Block(32), Block(32)], init=ZEROS, products=Fp8Products()
    )
    second = RowParallelLinear(place, Block(32), H, init=ZEROS, products=Fp8Products())
    for module in (first, second):
        randomize(declared_parameters(module), init=init)

    def run() -> list[Tensor]:
        x = _x(S, B, H).float().requires_grad_()
        _, normed = elementwise.add_norm(x, None, None, torch.ones(H), None, 1e-5)
        inner = first(normed)
        flat = elementwise.mlp_activation(inner.flatten(0, 1), None, "silu", True)
        y = second(flat.view(S, B, -1))
        return [y, *torch.autograd.grad(y.square().sum(), [x, first.weight, second.weight])]

    def sizes(x: Tensor, dtype: torch.dtype) -> Tensor:
        read.append(x.numel())
        return scale_of_whole(x, dtype)

    read: list[int] = []
    monkeypatch.setattr(fp8_products, "scale_of_whole", sizes)
    found = run()
    tokens, weights = S * B, [first.weight.numel(), second.weight.numel()]
    # Forward: input and weight of each layer; backward: the gradient of each, and again the weight,
    # which is kept within a step alone.
    assert read[:4] == [tokens, weights[0], tokens, weights[1]]
    assert read[4:] == [tokens * H, weights[1], tokens, weights[0]]
    read.clear()
    monkeypatch.setattr(fp8_products, "maxima_of", lambda x: x)
    expected = run()
    assert read[0] == tokens * H
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"fp8 needs .* 8.9 or more, but A100 has 8.0"):
        Fp8Products().check(device)
    PLAIN.check(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    Fp8Products().check(device)
