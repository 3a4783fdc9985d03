import dataclasses
from typing import Any

import pytest

from core.config.backend import (
    BACKEND_RULES,
    BackendUse,
    validate_backend,
    validate_fp8_sizes,
)
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.errors import ConfigError

ENGINE = BackendUse("transformer_engine", PrecisionConfig(), ParallelConfig(), "cuda")
NORM = RecomputeConfig(granularity="selective", modules=("mlp", "norm"))

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    (
        "_backend_has_recipe",
        {"precision": PrecisionConfig(fp8="rowwise")},
        "fp8 rowwise is a recipe of --backend local, and --backend transformer_engine has current, "
        "delayed, blockwise",
    ),
    (
        "_backend_has_recipe",
        {"backend": "local", "precision": PrecisionConfig(fp8="delayed")},
        "fp8 delayed is a recipe of --backend transformer_engine, and --backend local has current, "
        "rowwise",
    ),
    ("_engine_computes_on_cuda", {"device": "cpu"}, "runs on NVIDIA GPUs alone"),
    (
        "_engine_computes_in_16_bits",
        {"precision": PrecisionConfig(dtype="fp32")},
        "--precision.dtype fp32 has no kernels in --backend transformer_engine",
    ),
    (
        "_engine_computes_in_16_bits",
        {"precision": PrecisionConfig(dtype="fp64")},
        "--precision.dtype fp64 has no kernels",
    ),
    (
        "_engine_fuses_norms",
        {"parallel": ParallelConfig(recompute=NORM)},
        "recompute.modules norm does nothing with --backend transformer_engine",
    ),
    (
        "_engine_keeps_fp8_weights",
        {
            "precision": PrecisionConfig(fp8="current"),
            "parallel": ParallelConfig(data_parallel="fsdp2"),
        },
        "--parallel.data-parallel fsdp2 frees after every layer",
    ),
]


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_broken_rule_says_what_and_why(rule: str, changes: dict[str, Any], message: str) -> None:
    broken = dataclasses.replace(ENGINE, **changes)
    with pytest.raises(ConfigError, match=message):
        validate_backend(broken)
    [named] = [item for item in BACKEND_RULES if item.__name__ == rule]
    with pytest.raises(ConfigError, match=message):
        named(broken)


def test_every_rule_has_a_broken_case() -> None:
    assert {rule.__name__ for rule in BACKEND_RULES} == {rule for rule, _, _ in BROKEN}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": "auto"},
        {"precision": PrecisionConfig(dtype="fp16")},
        {"precision": PrecisionConfig(fp8="delayed")},
        {"precision": PrecisionConfig(fp8="blockwise")},
        {"parallel": ParallelConfig(data_parallel="fsdp2")},
        {"backend": "local", "device": "cpu", "precision": PrecisionConfig(dtype="fp64")},
        {"backend": "local", "parallel": ParallelConfig(recompute=NORM)},
    ],
    ids=str,
)
def test_sound_use_passes(changes: dict[str, Any]) -> None:
    validate_backend(dataclasses.replace(ENGINE, **changes))


MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=96,
    vocab_size=101,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    ("changes", "tp", "tokens", "message"),
    [
        ({"hidden_size": 72}, 1, 64, "hidden_size is 72"),
        ({}, 4, 64, "ffn_hidden_size / tp is 24"),
        ({"head_dim": 12, "num_attention_heads": 4}, 2, 64, "query width / tp is 24"),
        ({"head_dim": 8}, 2, 64, "key width / tp is 8"),
        ({}, 1, 40, "tokens of a microbatch is 40"),
        ({}, 2, 48, "tokens of a microbatch is 24"),
    ],
)
def test_fp8_products_need_multiples_of_16(
    changes: dict[str, Any], tp: int, tokens: int, message: str
) -> None:
    config = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ConfigError, match=f"{message}: change it, or leave fp8 out"):
        validate_fp8_sizes(config, tp, sequence_parallel=tp > 1, tokens=tokens)


def test_sizes_that_fit() -> None:
    validate_fp8_sizes(MODEL, 2, sequence_parallel=True, tokens=64)
    # The vocabulary is not multiplied in FP8.
    assert MODEL.vocab_size % 16
