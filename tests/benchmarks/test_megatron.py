"""What can be said of Megatron-Core without its package, which CI has not."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contestants.megatron import group_interleaved, load_weights, megatron_name
from benchmarks.contestants.weights import conversion_of, initial_weights
from benchmarks.workloads import workload

TINY = workload("tiny").config()
ENGINE = {
    "input_norm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_norm.": "mlp.linear_fc1.layer_norm_",
    "final_norm.": "final_layernorm.",
}
"""Where Megatron-Core's Transformer Engine layers have the norms."""


class _Model(nn.Module):
    """Only parameters, of any names."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.found = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}

    def named_parameters(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        return iter(self.found.items())


def _weights() -> dict[str, Tensor]:
    return initial_weights(conversion_of("tiny"), TINY, torch.device("cpu"))


def _engine_name(name: str) -> str:
    for ours, theirs in ENGINE.items():
        name = name.replace(ours, theirs)
    return name


def test_query_key_and_value_rows_are_grouped_by_key_head() -> None:
    config = dataclasses.replace(TINY, num_attention_heads=4, num_query_groups=2, head_dim=1)
    rows = torch.tensor([[0], [1], [2], [3], [20], [21], [30], [31]])  # q0..q3, k0, k1, v0, v1
    assert group_interleaved(rows, config).flatten().tolist() == [0, 1, 20, 30, 2, 3, 21, 31]


def test_every_weight_finds_its_place() -> None:
    weights = _weights()
    model = _Model({_engine_name(name): tuple(w.shape) for name, w in weights.items()})
    load_weights(model, TINY, weights)
    for name, value in weights.items():
        loaded = model.found[_engine_name(name)].data
        expected = group_interleaved(value, TINY) if "linear_qkv" in name else value
        torch.testing.assert_close(loaded, expected.float(), rtol=0, atol=0)
    assert megatron_name("decoder.layers.1.input_layernorm.weight") in weights


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_a_parameter_without_a_partner_is_refused(change: str) -> None:
    weights = _weights()
    shapes = {_engine_name(name): tuple(w.shape) for name, w in weights.items()}
    last = "decoder.final_layernorm.weight"
    if change == "missing":
        del shapes[last]
    elif change == "surplus":
        shapes["decoder.final_layernorm.bias"] = (1,)
    else:
        shapes[last] = (1,)
    with pytest.raises(ValueError, match=r"has no place for|has no partner|has the shape \(1,\)"):
        load_weights(_Model(shapes), TINY, weights)
