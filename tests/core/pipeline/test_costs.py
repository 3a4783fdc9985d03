import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from core.config.parallel import RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.pipeline.costs import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    FP8_PRODUCT,
    Part,
    Work,
    effective_work,
    language_model_parts,
)
from models.llama.config import PRESETS
from models.llama.model import build_llama


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_parts_cost_what_the_model_costs(preset: str, causal: bool) -> None:
    config = PRESETS[preset]()
    parts = language_model_parts(config, 4096, causal=causal)
    flops = config.flops_per_token(4096, causal=causal)
    products = 3 * sum(part.work.backward_weight for part in parts)
    attention = (ATTENTION_FORWARD + ATTENTION_BACKWARD) / 3 * (flops - products)
    total = sum(part.work.total for part in parts)
    assert total == pytest.approx(products + attention, rel=1e-12)
    assert [part.symbol for part in parts] == ["E", *"t" * config.num_layers, "L"]


def _config() -> TransformerConfig:
    return TransformerConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=24,
        vocab_size=32,
        max_position_embeddings=64,
    )


def test_windows_make_layers_cheaper() -> None:
    config = replace(_config(), sliding_window=8, sliding_window_layers=(1,))
    _, first, second, third, _ = language_model_parts(config, 64)
    assert second.work.total < first.work.total == third.work.total
    # Only the scores differ, which have no weights.
    assert second.work.backward_weight == first.work.backward_weight


def test_a_linear_layer_costs_the_same_three_times_and_scores_have_no_weights() -> None:
    _, layer, *_, head = language_model_parts(_config(), 64, causal=False)
    assert head.work == Work(2 * 16 * 32, 2 * 16 * 32, 2 * 16 * 32)
    gemms = layer.work.backward_weight
    assert gemms == 2 * (16 * (16 + 16) + 16 * 16 + 3 * 16 * 24)
    scores = 2 * 2 * 64 * 16  # two products over all keys, 4 heads of 4
    assert layer.work.forward == pytest.approx(gemms + ATTENTION_FORWARD * scores)
    assert layer.work.backward_input == pytest.approx(gemms + ATTENTION_BACKWARD * scores)


_MLP = 2 * 3 * 16 * 24
_SCORES = ATTENTION_FORWARD * 2 * 2 * 64 * 16


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        (
            RecomputeConfig(granularity="full", num_layers=2),
            2 * (16 * 32 + 16 * 16) + _MLP + _SCORES,
        ),
        (RecomputeConfig(granularity="full", method="block"), 0.0),
        (RecomputeConfig(granularity="selective", modules=("core_attention",)), _SCORES),
        (RecomputeConfig(granularity="selective", modules=("norm", "mlp")), _MLP),
    ],
    ids=["full", "block", "attention", "mlp"],
)
def test_what_is_recomputed_delays_the_input_gradient(
    recompute: RecomputeConfig, expected: float
) -> None:
    parts = language_model_parts(_config(), 64, causal=False)
    again = language_model_parts(_config(), 64, causal=False, recompute=recompute)
    for once, twice in zip(parts, again, strict=True):
        more = expected if once.symbol == "t" else 0.0
        assert twice.work.backward_input == pytest.approx(once.work.backward_input + more)
        assert replace(twice.work, backward_input=0.0) == replace(once.work, backward_input=0.0)


def test_layers_in_fp8_are_cheaper_beside_their_scores_and_the_head() -> None:
    precision = PrecisionConfig(fp8="current", fp8_bf16_last_layers=1)
    plain = language_model_parts(_config(), 64)
    mixed = language_model_parts(_config(), 64, precision=precision)
    for before, after in zip(plain[1:3], mixed[1:3], strict=True):
        products = before.work.backward_weight
        saved = (1 - FP8_PRODUCT) * products
        assert after.work.backward_weight == pytest.approx(FP8_PRODUCT * products)
        assert after.work.total == pytest.approx(before.work.total - 3 * saved)
    assert mixed[0] == plain[0]
    assert mixed[3:] == plain[3:]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_embedding": "learned", "parallel_residual": True},
        {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True},
        {"normalization": "layernorm", "qk_norm": "rmsnorm", "gated_mlp": False},
        {"qk_norm": "layernorm"},
    ],
)
def test_parameters_are_those_of_the_built_model(changes: dict[str, Any]) -> None:
    config = replace(_config(), **changes)
    place = Placement(ParallelContext.single(), torch.float32, torch.device("meta"))
    sizes = {"E": 0, "t": 0, "L": 0}
    for name, declared in declared_parameters(build_llama(config, place)).items():
        symbol = "E" if name.startswith("embedding") else "t" if "layers." in name else "L"
        sizes[symbol] += math.prod(declared.sharding.global_shape)
    counted = dict.fromkeys(sizes, 0)
    for part in language_model_parts(config, 64):
        counted[part.symbol] += part.parameters
    assert counted == sizes


def _part(*, frozen: bool = False, parameters: int = 1) -> Part:
    return Part(symbol="t", name="t", work=Work(1, 2, 4), parameters=parameters, frozen=frozen)


def test_frozen_parts_cost_less() -> None:
    frozen, trained, empty = _part(frozen=True), _part(), _part(parameters=0)
    assert effective_work([frozen, empty, trained, frozen, empty, trained]) == (
        Work(1, 0, 0),
        Work(1, 0, 0),
        Work(1, 2, 4),
        Work(1, 2, 0),
        Work(1, 2, 0),
        Work(1, 2, 4),
    )
