from typing import Any

import pytest

from core.config.parallel import (
    PARALLEL_RULES,
    ParallelConfig,
    RecomputeConfig,
    validate_parallel,
)
from core.errors import ConfigError

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("_sizes_are_positive", {"tp": 0}, "--parallel.tp is 0: it must be at least 1"),
    ("_sizes_are_positive", {"pp": -1}, "--parallel.pp is -1"),
    ("_sizes_are_positive", {"bucket_mib": 0}, "--parallel.bucket.mib is 0"),
    ("_sizes_are_positive", {"virtual_stages": 0}, "--parallel.virtual-stages is 0"),
    ("_pipeline_knobs_do_something", {"schedule": "zbv"}, "schedule zbv does nothing with"),
    ("_pipeline_knobs_do_something", {"virtual_stages": 2}, "virtual-stages 2 does nothing"),
    ("_pipeline_knobs_do_something", {"layout": "EtL"}, "layout 'EtL' does nothing with"),
    ("_axes_are_built", {"cp": 2}, "--parallel.cp is 2"),
    ("_axes_are_built", {"ep": 2}, "--parallel.ep is 2"),
    (
        "_sequence_parallel_needs_tp",
        {"sequence_parallel": True},
        "--parallel.sequence-parallel does nothing with --parallel.tp 1",
    ),
    (
        "_tp_overlap_has_something_to_hide",
        {"tp": 2, "tp_overlap": "symmetric_memory"},
        "--parallel.tp-overlap symmetric_memory does nothing without --parallel.sequence-parallel",
    ),
    (
        "_fsdp2_has_one_stage",
        {"data_parallel": "fsdp2", "pp": 2},
        "fsdp2 gathers every layer in every microbatch, of which --parallel.pp 2 needs many",
    ),
    (
        "_data_parallel_knobs_do_something",
        {"data_parallel": "replicated", "overlap_param_gather": False},
        "no-overlap-param-gather does nothing with --parallel.data-parallel replicated",
    ),
    (
        "_data_parallel_knobs_do_something",
        {"data_parallel": "fsdp2", "overlap_grad_reduce": False},
        "no-overlap-grad-reduce does nothing with --parallel.data-parallel fsdp2",
    ),
    (
        "_data_parallel_knobs_do_something",
        {"data_parallel": "fsdp2", "bucket_mib": 50},
        "--parallel.bucket-mib 50 does nothing with --parallel.data-parallel fsdp2",
    ),
    (
        "_recompute_knobs_do_something",
        {"recompute": RecomputeConfig(granularity="selective")},
        "selective needs --parallel.recompute.modules, some of core_attention, mlp, norm",
    ),
    (
        "_recompute_knobs_do_something",
        {"recompute": RecomputeConfig(granularity="full", modules=("mlp", "norm"))},
        "modules mlp norm does nothing with granularity full",
    ),
    (
        "_recompute_knobs_do_something",
        {"recompute": RecomputeConfig(num_layers=2)},
        "do nothing with granularity none",
    ),
    (
        "_recompute_knobs_do_something",
        {"recompute": RecomputeConfig(method="block")},
        "do nothing with granularity none",
    ),
    (
        "_recompute_knobs_do_something",
        {"recompute": RecomputeConfig(granularity="full", num_layers=0)},
        "num-layers is 0: it must be at least 1",
    ),
]

SOUND: list[dict[str, Any]] = [
    {},
    {"tp": 4, "sequence_parallel": True, "dp": 2},
    {"data_parallel": "fsdp2", "tp": 2, "sequence_parallel": True},
    {"data_parallel": "replicated", "bucket_mib": 50, "overlap_grad_reduce": False},
    {"recompute": RecomputeConfig(granularity="selective", modules=("core_attention",))},
    {"data_parallel": "replicated"},
    {"overlap_param_gather": False},
    {"recompute": RecomputeConfig(granularity="full")},
    {"recompute": RecomputeConfig(granularity="full", method="block", num_layers=3)},
]


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_broken_rule_says_what_and_why(rule: str, changes: dict[str, Any], message: str) -> None:
    broken = ParallelConfig(**changes)
    with pytest.raises(ConfigError, match=message):
        validate_parallel(broken)
    [named] = [item for item in PARALLEL_RULES if item.__name__ == rule]
    with pytest.raises(ConfigError, match=message):
        named(broken)


def test_every_rule_has_a_broken_case() -> None:
    assert {rule.__name__ for rule in PARALLEL_RULES} == {rule for rule, _, _ in BROKEN}


@pytest.mark.parametrize("changes", SOUND)
def test_sound_config_passes(changes: dict[str, Any]) -> None:
    validate_parallel(ParallelConfig(**changes))


def test_data_parallelism_takes_what_is_left() -> None:
    assert ParallelConfig().data_parallel_size(8) == 8
    assert ParallelConfig(tp=2).data_parallel_size(8) == 4
    assert ParallelConfig(tp=2, pp=2, dp=2).data_parallel_size(8) == 2


def test_processes_that_the_axes_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"6 processes .* = 2 \* 2 = 4"):
        ParallelConfig(tp=2, pp=2).data_parallel_size(6)


def test_dp_that_does_not_match() -> None:
    with pytest.raises(ConfigError, match=r"--parallel.dp is 4, but 4 processes .* leave 2: .* 8"):
        ParallelConfig(tp=2, dp=4).data_parallel_size(4)
