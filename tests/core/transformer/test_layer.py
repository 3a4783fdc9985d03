import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.transformer import TransformerConfig
from core.kernels import elementwise
from core.layers.attention import CoreAttention, SelfAttention, SelfAttentionSubmodules
from core.layers.cross_attention import CrossAttention, CrossAttentionSubmodules
from core.layers.forward_info import ForwardInfo
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.mlp import MLP, MLPSubmodules
from core.layers.norm import LayerNorm, RMSNorm
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.spec import ModuleSpec
from core.testing.layouts import randomize
from core.transformer.layer import TransformerLayer, TransformerLayerSubmodules

PLACE = Placement(ParallelContext.single(), torch.float64, torch.device("cpu"))
COLUMN, ROW = ModuleSpec(ColumnParallelLinear), ModuleSpec(RowParallelLinear)
CORE = ModuleSpec(CoreAttention)
NORM: ModuleSpec[nn.Module] = ModuleSpec(LayerNorm)
CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    ffn_hidden_size=20,
    vocab_size=67,
    max_position_embeddings=64,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
)
EVERYTHING = TransformerLayerSubmodules(
    input_norm=NORM,
    self_attention=ModuleSpec(SelfAttention, submodules=SelfAttentionSubmodules(COLUMN, CORE, ROW)),
    post_attention_norm=NORM,
    cross_attention_norm=NORM,
    cross_attention=ModuleSpec(
        CrossAttention, submodules=CrossAttentionSubmodules(COLUMN, COLUMN, CORE, ROW)
    ),
    pre_mlp_norm=NORM,
    mlp=ModuleSpec(MLP, submodules=MLPSubmodules(COLUMN, ROW)),
    post_mlp_norm=NORM,
)
PLAIN = TransformerLayerSubmodules(
    EVERYTHING.input_norm, EVERYTHING.self_attention, EVERYTHING.pre_mlp_norm, EVERYTHING.mlp
)


def _layer(submodules: TransformerLayerSubmodules, **changes: Any) -> TransformerLayer:
    config = dataclasses.replace(CONFIG, **changes)
    layer = TransformerLayer(config, PLACE, name="decoder.layers.3", submodules=submodules)
    randomize(declared_parameters(layer))
    return layer


def _x(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, 2, 16, generator=generator, dtype=torch.float64)


def test_pre_norm_residual_branches() -> None:
    layer, x, info = _layer(PLAIN), _x(6), ForwardInfo()
    a, m = layer.self_attention, layer.mlp
    h = x + a(layer.input_norm(x), info) + a.output_bias
    expected = h + m(layer.pre_mlp_norm(h)) + m.output_bias
    torch.testing.assert_close(layer(x, info), expected, rtol=1e-12, atol=1e-12)
    assert not layer.has_cross_attention
    assert len(declared_parameters(layer)) == 2 * 2 + 4 + 4


def test_a_norm_after_a_branch_sees_its_bias() -> None:
    layer, x, info = _layer(EVERYTHING), _x(6), ForwardInfo(encoded=_x(4, 1))
    a, c, m = layer.self_attention, layer.cross_attention, layer.mlp
    h = x + layer.post_attention_norm(a(layer.input_norm(x), info) + a.output_bias)
    h = h + c(layer.cross_attention_norm(h), info) + c.output_bias
    expected = h + layer.post_mlp_norm(m(layer.pre_mlp_norm(h)) + m.output_bias)
    torch.testing.assert_close(layer(x, info), expected, rtol=1e-12, atol=1e-12)


def test_the_branches_drop_by_masks_of_their_own() -> None:
    layer, key = _layer(EVERYTHING, hidden_dropout=0.5), DropoutKey(1, 2, 3)
    x, zeros = torch.zeros(6, 2, 16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    masks = []
    for add in (layer.attention_add, layer.cross_add, layer.mlp_add):
        masks.append(tuple((add(x + 1, zeros, x, key) > 0).flatten().tolist()))
    assert len(set(masks)) == 3
    dropped, kept = (ForwardInfo(key=which, encoded=_x(4, 1)) for which in (key, None))
    assert not torch.allclose(layer(_x(6), dropped), layer(_x(6), kept))


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("core_attention", ["self_attention.core_attention", "cross_attention.core_attention"]),
        ("mlp", ["mlp"]),
        (
            "norm",
            [
                *("input_norm", "post_attention_norm", "cross_attention_norm"),
                *("pre_mlp_norm", "post_mlp_norm"),
            ],
        ),
    ],
)
def test_recompute_runs_a_module_twice_in_training(name: str, again: list[str]) -> None:
    layer = _layer(EVERYTHING)
    runs: dict[str, int] = {}
    for path, module in layer.named_modules():
        if isinstance(module, CoreAttention | MLP | LayerNorm):
            plain = module.forward

            def counted(*args: Any, path: str = path, plain: Any = plain) -> Any:
                runs[path] = runs.get(path, 0) + 1
                return plain(*args)

            setattr(module, "forward", counted)  # noqa: B010 (a checker refuses the assignment)
    layer.recompute_modules([name])
    for training, expected in ((True, 2), (False, 1)):
        runs.clear()
        layer.train(training)
        layer(_x(6).requires_grad_(), ForwardInfo(encoded=_x(4, 1))).sum().backward()
        assert {path for path, count in runs.items() if count == 2} == set(again * (expected - 1))
        assert len(runs) == 8


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", [[], ["norm", "mlp"]])
def test_norms_that_take_the_sum_before_them(
    monkeypatch: pytest.MonkeyPatch, recompute: list[str], dropout: float
) -> None:
    """The hand-written kernels in place of the plain functions; sums with dropout, and those before
    a norm that is recomputed, stay by themselves."""
    pytest.importorskip("triton")
    norm: ModuleSpec[nn.Module] = ModuleSpec(RMSNorm)
    submodules = dataclasses.replace(
        EVERYTHING, input_norm=norm, cross_attention_norm=norm, pre_mlp_norm=norm
    )
    config = dataclasses.replace(CONFIG, attention_output_bias=False, hidden_dropout=dropout)
    place = dataclasses.replace(PLACE, dtype=torch.float32)
    layer = TransformerLayer(config, place, name="decoder.layers.3", submodules=submodules)
    randomize(declared_parameters(layer))
    sums: list[bool] = []
    for name in ("input_norm", "cross_attention_norm", "pre_mlp_norm"):
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args: sums.append(args[1] is not None)
        )
    layer.recompute_modules(recompute)
    info = ForwardInfo(key=DropoutKey(1, 2, 3), encoded=_x(4, 1).float())
    results = []
    for twins in (False, True):
        monkeypatch.setattr(elementwise, "has_triton_twin", lambda x, twins=twins: twins)
        x = _x(6).float().requires_grad_()
        out = layer(x, info)
        weight = torch.arange(out.numel(), dtype=torch.float32).view(out.shape).sin()
        results.append([out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    plain = bool(recompute) or dropout > 0.0
    assert sums == [False, not plain, not plain] * 2
