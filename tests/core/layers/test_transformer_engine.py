from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.data_parallel.deferred import DeferredProducts
from core.data_parallel.derived import StepCache
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.norm import LayerNorm, RMSNorm
from core.layers.transformer_engine import (
    EngineColumnParallelLinear,
    EngineLayerNorm,
    EngineNormColumnParallelLinear,
    EngineOptions,
    EngineRMSNorm,
    EngineRowParallelLinear,
    FusedNorm,
    fp8_recipe,
    fp8_region,
)
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import ZEROS
from core.parallel.sharding import declared_parameters
from core.testing.fake_transformer_engine import Globals, installed
from core.testing.layouts import randomize

PLACE = Placement(ParallelContext.single(), torch.float64, torch.device("cpu"))
BF16 = Placement(ParallelContext.single(), torch.bfloat16, torch.device("cpu"))
H, F = 16, 32


@pytest.fixture(autouse=True)
def stand_in() -> Iterator[Globals]:
    with installed() as state:
        yield state


class _Buffered:
    """What the buffers set on a weight, with a count of `grad_ready`."""

    def __init__(self, weight: Any) -> None:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        weight.main_grad = torch.zeros(weight.shape, dtype=dtype)
        weight.derived, weight.deferred = StepCache(), DeferredProducts()
        weight.derived.open()
        weight.grad_ready = self
        self.ready, self.weight = 0, weight

    def __call__(self) -> None:
        self.ready += 1


def _column(place: Placement = PLACE, **options: Any) -> EngineColumnParallelLinear:
    layer = EngineColumnParallelLinear(
        place, H, [Block(F)], init=ZEROS, bias=True, options=EngineOptions(**options)
    )
    randomize(declared_parameters(layer))
    return layer


def _input(place: Placement = PLACE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 2, H, generator=generator).to(place.dtype)


def _twins() -> list[tuple[nn.Module, nn.Module]]:
    """Layers and their local twins."""
    linear: dict[str, Any] = {"init": ZEROS, "bias": True}
    plain, split = EngineOptions(), EngineOptions(split_backward=True)
    twins: list[tuple[nn.Module, nn.Module]] = [
        (EngineRMSNorm(PLACE, H, 1e-5), RMSNorm(PLACE, H, 1e-5)),
        (EngineLayerNorm(PLACE, H, 1e-5), LayerNorm(PLACE, H, 1e-5)),
        (
            EngineRowParallelLinear(PLACE, Block(H), F, options=plain, **linear),
            RowParallelLinear(PLACE, Block(H), F, **linear),
        ),
    ]
    for options, skips in ((plain, False), (plain, True), (split, False)):
        more = {**linear, "skip_bias_add": skips}
        twins.append(
            (
                EngineColumnParallelLinear(PLACE, H, [Block(F)], options=options, **more),
                ColumnParallelLinear(PLACE, H, [Block(F)], **more),
            )
        )
    return twins


@pytest.mark.parametrize("index", range(6))
def test_a_layer_and_its_local_twin(index: int) -> None:
    engine, local = _twins()[index]
    declared = [declared_parameters(module) for module in (engine, local)]
    shown = [{n: (d.sharding, d.init, d.weight_decay) for n, d in one.items()} for one in declared]
    assert shown[0] == shown[1]
    for one in declared:
        randomize(one)
    if index == 5:  # its weight gradient goes to main_grad, as a pipeline has it
        for module in (engine, local):
            _Buffered(module.weight)
    results = []
    for module in (engine, local):
        x = _input().requires_grad_()
        y = module(x)
        y.sin().sum().backward()
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        gradients |= {n: _main_grad(p) for n, p in module.named_parameters() if _buffered(p)}
        results.append((y, x.grad, gradients))
    for mine, theirs in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert results[0][2].keys() == results[1][2].keys()
    torch.testing.assert_close(results[0][2], results[1][2])


def _main_grad(parameter: Any) -> Tensor:
    grad: Tensor = parameter.main_grad
    return grad


def _buffered(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "main_grad")


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_fused_norm_and_linear(kind: Any) -> None:
    fused = EngineNormColumnParallelLinear(
        PLACE,
        H,
        [Block(F)],
        init=ZEROS,
        bias=True,
        norm=FusedNorm(kind, 1e-5, "decoder.layers.3.input_norm"),
        options=EngineOptions(),
    )
    norm: nn.Module = (RMSNorm if kind == "rmsnorm" else LayerNorm)(PLACE, H, 1e-5)
    linear = ColumnParallelLinear(PLACE, H, [Block(F)], init=ZEROS, bias=True)
    declared = declared_parameters(fused)
    names = {f"decoder.layers.3.input_norm.{n}" for n, _ in norm.named_parameters()}
    assert declared.keys() == names | {"weight", "bias"}
    randomize(declared)
    for name in names:
        norm.get_parameter(name.rpartition(".")[2]).data.copy_(declared[name].local)
    for name in ("weight", "bias"):
        linear.get_parameter(name).data.copy_(declared[name].local)
    x, twin = _input().requires_grad_(), _input().requires_grad_()
    y, expected = fused(x), linear(norm(twin))
    torch.testing.assert_close(y, expected)
    for out in (y, expected):
        out.sin().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    for name in names:
        theirs = norm.get_parameter(name.rpartition(".")[2]).grad
        torch.testing.assert_close(declared[name].parameter.grad, theirs)


def test_nothing_of_the_package_is_in_the_module_tree() -> None:
    layer = _column()
    assert [name for name, _ in layer.named_modules()] == [""]
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert all(not parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize("input_grad", [True, False])
def test_every_microbatch_adds_to_main_grad_and_says_so(input_grad: bool) -> None:
    layer = _column()
    buffered = _Buffered(layer.weight)
    expected = torch.zeros_like(layer.weight)
    for step in (1, 2):
        buffered.weight.derived.open()
        # Left over: the first microbatch of a step overwrites it.
        buffered.weight.main_grad.fill_(7.0)
        expected.zero_()
        for seed in range(3):
            x = _input(seed=seed).requires_grad_(input_grad)
            layer(x).sum().backward()
            expected += x.detach().flatten(0, 1).sum(0)
            assert buffered.ready == 3 * (step - 1) + seed + 1
            assert layer.weight.grad is None
        torch.testing.assert_close(buffered.weight.main_grad, expected)


def test_outside_of_steps_nothing_is_overwritten() -> None:
    layer = _column()
    buffered = _Buffered(layer.weight)
    buffered.weight.derived.close()
    for _ in range(2):
        layer(_input()).sum().backward()
    expected = 2 * _input().flatten(0, 1).sum(0)
    torch.testing.assert_close(buffered.weight.main_grad, expected.expand(F, H))


def test_an_evaluation_between_microbatches_changes_nothing() -> None:
    layer = _column(BF16, fp8="current")
    buffered = _Buffered(layer.weight)
    with fp8_region("current", BF16.ctx):
        layer(_input(BF16)).sum().backward()
        before = buffered.weight.main_grad.clone()
        with torch.no_grad():
            layer(_input(BF16))
        layer(_input(BF16)).sum().backward()
    torch.testing.assert_close(buffered.weight.main_grad, 2 * before)


def test_the_fp8_copy_of_a_weight_is_made_once_a_step() -> None:
    layer = _column(BF16, fp8="current")
    buffered = _Buffered(layer.weight)
    with fp8_region("current", BF16.ctx):
        first = layer(_input(BF16)).detach()
        layer.weight.data.zero_()
        assert torch.equal(layer(_input(BF16)), first)
        with torch.no_grad():  # an evaluation has new weights
            assert not torch.equal(layer(_input(BF16)), first)
        buffered.weight.derived.open()
        assert torch.equal(layer(_input(BF16)), layer.bias.expand_as(first))  # type: ignore[union-attr]


def test_a_weight_gradient_is_put_off() -> None:
    layer = _column(split_backward=True)
    buffered = _Buffered(layer.weight)
    deferred: DeferredProducts = buffered.weight.deferred
    with deferred.collect() as products:
        layer(_input(seed=0)).sum().backward()
    assert buffered.ready == 0
    assert not buffered.weight.main_grad.any()
    # A whole backward pass in between takes the older product; the sum is the same.
    layer(_input(seed=1)).sum().backward()
    assert buffered.ready == 1
    for product in products:
        product()
    assert buffered.ready == 2
    expected = torch.stack([_input(seed=seed).flatten(0, 1).sum(0) for seed in (0, 1)]).sum(0)
    torch.testing.assert_close(buffered.weight.main_grad, expected.expand(F, H))


def test_a_layer_among_fp8_stays_in_16_bits() -> None:
    plain, among, eight = _column(BF16), _column(BF16, among_fp8=True), _column(BF16, fp8="current")
    outside = plain(_input(BF16))
    with fp8_region("current", BF16.ctx):
        assert torch.equal(among(_input(BF16)), outside)
        assert not torch.equal(eight(_input(BF16)), outside)


def test_scaling_state_is_where_the_layer_uses_it() -> None:
    layer = _column(BF16, fp8="delayed")
    state = layer.scaling_state()
    assert list(state) == ["scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd"]
    before = {name: tensor.data_ptr() for name, tensor in state.items()}
    with fp8_region("delayed", BF16.ctx):
        y = layer(_input(BF16).requires_grad_())
    y.sum().backward()
    after = layer.scaling_state()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == before
    assert after["scale_fwd"][0] > 1.0
    assert after["scale_bwd"][0] > 1.0
    for fp8 in ("none", "current", "blockwise"):
        assert _column(BF16, fp8=fp8).scaling_state() == {}


def test_one_object_for_each_recipe() -> None:
    assert fp8_recipe("delayed", True) is fp8_recipe("delayed", True)
    names = [type(fp8_recipe(fp8, False)).__name__ for fp8 in ("delayed", "current", "blockwise")]
    assert names == ["DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling"]
    assert not fp8_recipe("delayed", False).reduce_amax
