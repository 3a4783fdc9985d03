import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.backends.local import LocalSpecProvider
from core.config.parallel import RecomputeConfig
from core.config.transformer import TransformerConfig
from core.errors import ConfigError
from core.layers.forward_info import ForwardInfo
from core.layers.norm import RMSNorm
from core.layers.rotary import RotaryEmbedding
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.spec import IdentityOp, ModuleSpec
from core.testing.layouts import randomize
from core.transformer.decoder import decoder_layer_spec
from core.transformer.stack import LayerStack

CPU = torch.device("cpu")
S, B, H = 16, 2, 16
CONFIG = TransformerConfig(
    num_layers=5,
    hidden_size=H,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=67,
    max_position_embeddings=64,
    attention_dropout=0.2,
    hidden_dropout=0.1,
)
BACKEND = LocalSpecProvider()
KEY = DropoutKey(seed=1, step=2, first_sample=3)
PLAIN = RecomputeConfig()


class _Scale(nn.Module):
    """A layer of another kind."""

    def __init__(
        self, config: TransformerConfig, place: Placement, *, name: str, factor: float
    ) -> None:
        super().__init__()
        self.name, self.factor = name, factor

    def forward(self, hidden: Tensor, info: ForwardInfo) -> Tensor:
        scaled = hidden * self.factor
        return scaled if info.encoded is None else scaled + info.encoded


def _stack(
    layers: dict[int, ModuleSpec[Any]] | None = None,
    recompute: RecomputeConfig = PLAIN,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> LayerStack:
    if layers is None:
        layers = {i: decoder_layer_spec(CONFIG, BACKEND, i) for i in range(CONFIG.num_layers)}
    place = Placement(ParallelContext.single(), dtype, CPU)
    stack = LayerStack(CONFIG, place, name="decoder", layers=layers, recompute=recompute, **kwargs)
    randomize(declared_parameters(stack))
    return stack


def _info() -> ForwardInfo:
    return ForwardInfo(RotaryEmbedding(CONFIG.rope, CONFIG.kv_channels)(S, CPU), KEY)


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(S, B, H, generator=generator, dtype=dtype)


def test_layers_of_many_kinds_numbered_over_the_whole_model() -> None:
    other = dataclasses.replace(CONFIG, ffn_hidden_size=8)
    scale: ModuleSpec[Any] = ModuleSpec(_Scale, params={"factor": 0.5})
    layers = {
        7: decoder_layer_spec(CONFIG, BACKEND, 7),
        8: scale,
        11: decoder_layer_spec(other, BACKEND, 11),
    }
    stack = _stack(layers, final_norm=ModuleSpec(RMSNorm))
    names = set(declared_parameters(stack))
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"7", "11"}
    assert "final_norm.weight" in names
    found = stack.layers
    assert isinstance(found["8"], _Scale)
    assert found["8"].name == "decoder.layers.8"
    info, x = _info(), _x()
    expected = stack.final_norm(found["11"](found["8"](found["7"](x, info), info), info))
    assert torch.equal(stack(x, info), expected)


def test_a_stage_within_the_stack_ends_without_a_norm() -> None:
    stack = _stack({2: ModuleSpec(_Scale, params={"factor": 3.0})})
    assert isinstance(stack.final_norm, IdentityOp)
    assert torch.equal(stack(_x(), ForwardInfo()), 3 * _x())
    assert torch.equal(stack(_x(), ForwardInfo(encoded=2 * _x())), 3 * _x() + 2 * _x())


def test_recompute_keeps_the_gradient_of_what_an_encoder_gave() -> None:
    layers: dict[int, ModuleSpec[Any]] = {
        i: ModuleSpec(_Scale, params={"factor": 2.0}) for i in range(3)
    }
    full = RecomputeConfig(granularity="full", method="uniform", num_layers=2)
    encoded = _x().requires_grad_()
    _stack(layers, full)(_x(), ForwardInfo(encoded=encoded)).sum().backward()
    assert encoded.grad is not None
    assert torch.equal(encoded.grad, torch.full_like(encoded, 4.0 + 2.0 + 1.0))


def test_dropout_follows_the_global_number() -> None:
    outputs = []
    for number in (0, 1):
        stack = _stack({number: decoder_layer_spec(CONFIG, BACKEND, number)})
        parameters = declared_parameters(stack)
        for declared in parameters.values():
            declared.parameter.data.fill_(0.1)
        outputs.append(stack(_x(), _info()))
    assert not torch.allclose(*outputs)


# ---- Recompute -----------------------------------------------------------------------------------

FULL = {
    f"{method} {n}": RecomputeConfig(granularity="full", method=method, num_layers=n)
    for method in ("uniform", "block")
    for n in (1, 2, 5, 9)
}
SELECTIVE = {
    " ".join(modules): RecomputeConfig(granularity="selective", modules=modules)
    for modules in (
        ("core_attention",),
        ("mlp",),
        ("norm",),
        ("core_attention", "mlp", "norm"),
    )
}


class _SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def _train(stack: LayerStack) -> tuple[list[Tensor], int]:
    """Output, gradients of the input and of all parameters; bytes kept between the passes."""
    x, saved = _x().requires_grad_(), _SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x):
        out = stack(x, _info())
    out.sin().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in stack.parameters())]
    assert all(tensor is not None for tensor in found)
    return found, saved.total


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple[list[Tensor], int]]:
    configs = {"none": PLAIN} | FULL | SELECTIVE
    return {name: _train(_stack(recompute=config)) for name, config in configs.items()}


@pytest.mark.parametrize("name", FULL | SELECTIVE)
def test_recompute_gives_the_same_bits_and_keeps_less(
    name: str, trained: dict[str, tuple[list[Tensor], int]]
) -> None:
    (expected, before), (actual, after) = trained["none"], trained[name]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert after < before


def test_full_recompute_keeps_the_inputs_of_groups(
    trained: dict[str, tuple[list[Tensor], int]],
) -> None:
    part, before = S * B * H * 4, trained["none"][1]
    tables = 2 * S * CONFIG.kv_channels * 4  # of rotary embedding, shared by the layers
    for name, groups, others in (
        ("uniform 1", 5, 0),
        ("uniform 2", 3, 0),
        ("uniform 5", 1, 0),
        ("uniform 9", 1, 0),
        ("block 1", 1, 4),
        ("block 2", 2, 3),
        ("block 5", 5, 0),
        ("block 9", 5, 0),
    ):
        layers = others * (before - tables) / 5
        assert trained[name][1] == groups * part + layers + (tables if others else 0), name


def test_selective_recompute_adds_up(trained: dict[str, tuple[list[Tensor], int]]) -> None:
    alone = [trained[name][1] for name in ("core_attention", "mlp", "norm")]
    assert trained["core_attention mlp norm"][1] < min(alone)


def test_no_recompute_in_evaluation() -> None:
    for config in (FULL["uniform 1"], SELECTIVE["mlp"]):
        stack = _stack(recompute=config).eval()
        plain = _stack().eval()
        (out, *grads), kept = _train(stack)
        (expected, *expected_grads), before = _train(plain)
        assert kept == before
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_layer_without_recomputable_modules() -> None:
    layers: dict[int, ModuleSpec[Any]] = {4: ModuleSpec(_Scale, params={"factor": 3.0})}
    with pytest.raises(ConfigError, match=r"decoder\.layers\.4 is a _Scale, which cannot recomp"):
        _stack(layers, SELECTIVE["mlp"])
