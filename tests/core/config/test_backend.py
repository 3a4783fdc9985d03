import dataclasses
from typing import Any

import pytest

from core.config.backend import (
    BACKEND_RULES,
    BackendUse,
    validate_backend,
)
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
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
    (
        "_engine_communicates_by_itself",
        {"parallel": ParallelConfig(tp=2, sequence_parallel=True, tp_overlap="symmetric_memory")},
        "--parallel.tp-overlap symmetric_memory does nothing with --backend transformer_engine",
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
