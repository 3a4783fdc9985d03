import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from core.backends.local import LocalSpecProvider
from core.config.transformer import RopeConfig, TransformerConfig
from core.layers.attention import CoreAttention
from core.layers.forward_info import ForwardInfo
from core.layers.mlp import MLP
from core.layers.norm import LayerNorm
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.spec import build_module
from core.testing.layouts import randomize
from core.transformer.decoder import decoder_layer_spec
from core.transformer.layer import TransformerLayer
from core.transformer.parallel_layer import ParallelResidualLayer

PLACE = Placement(ParallelContext.single(), torch.float64, torch.device("cpu"))
CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    ffn_hidden_size=20,
    vocab_size=67,
    max_position_embeddings=64,
    rope=RopeConfig(partial_factor=0.5),
    normalization="layernorm",
    activation="gelu",
    gated_mlp=False,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    parallel_residual=True,
)


def _layer(**changes: Any) -> Any:
    config = dataclasses.replace(CONFIG, **changes)
    spec = decoder_layer_spec(config, LocalSpecProvider(), 1)
    layer = build_module(spec, config, PLACE, name="decoder.layers.1")
    randomize(declared_parameters(layer))
    return layer


def _x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 2, 16, generator=generator, dtype=torch.float64)


def test_both_branches_see_the_input_of_the_layer() -> None:
    layer, x, info = _layer(), _x(), ForwardInfo()
    assert isinstance(layer, ParallelResidualLayer)
    a, m = layer.self_attention, layer.mlp
    expected = x + a(layer.input_norm(x), info) + a.output_bias
    expected = expected + m(layer.pre_mlp_norm(x)) + m.output_bias
    torch.testing.assert_close(layer(x, info), expected, rtol=1e-12, atol=1e-12)


def test_it_is_another_layer_of_the_same_parts() -> None:
    """With one set of weights the two differ in what they compute, and in nothing else."""
    parallel, serial = _layer(), _layer(parallel_residual=False)
    assert isinstance(serial, TransformerLayer)
    names = {name: d.sharding for name, d in declared_parameters(parallel).items()}
    assert names == {name: d.sharding for name, d in declared_parameters(serial).items()}
    serial.load_state_dict(parallel.state_dict())
    assert not torch.allclose(parallel(_x(), ForwardInfo()), serial(_x(), ForwardInfo()))


def test_the_branches_drop_by_masks_of_their_own() -> None:
    layer, key = _layer(hidden_dropout=0.5), DropoutKey(1, 2, 3)
    x, zeros = torch.zeros(6, 2, 16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    masks = [add(x + 1, zeros, x, key) > 0 for add in (layer.attention_add, layer.mlp_add)]
    assert not torch.equal(*masks)
    dropped, kept = layer(_x(), ForwardInfo(key=key)), layer(_x(), ForwardInfo())
    assert not torch.allclose(dropped, kept)


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("core_attention", {"self_attention.core_attention"}),
        ("mlp", {"mlp"}),
        ("norm", {"input_norm", "pre_mlp_norm"}),
    ],
)
def test_recompute_runs_a_module_twice_in_training(name: str, again: set[str]) -> None:
    layer = _layer()
    runs: dict[str, int] = {}
    for path, module in layer.named_modules():
        if isinstance(module, CoreAttention | MLP | LayerNorm):
            plain = module.forward

            def counted(*args: Any, path: str = path, plain: Any = plain) -> Any:
                runs[path] = runs.get(path, 0) + 1
                return plain(*args)

            setattr(module, "forward", counted)  # noqa: B010 (a checker refuses the assignment)
    layer.recompute_modules([name])
    layer(_x().requires_grad_(), ForwardInfo()).sum().backward()
    assert {path for path, count in runs.items() if count == 2} == again
    assert len(runs) == 4
