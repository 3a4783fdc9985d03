import dataclasses
from typing import Any

import pytest

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RUN_RULES, RunConfig, validate_run
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.errors import ConfigError

MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=96,
    vocab_size=100,
    max_position_embeddings=128,
)
DATA = DataConfig(train=("corpus",), seq_length=128)


def run(**changes: Any) -> RunConfig[TransformerConfig]:
    return RunConfig(**{"model": MODEL, "data": DATA, **changes})


def data(**changes: Any) -> DataConfig:
    return dataclasses.replace(DATA, **changes)


BROKEN: list[tuple[str, dict[str, Any], str]] = [
    (
        "_sequence_fits_model",
        {"data": data(seq_length=129)},
        "--data.seq-length 129 is above --model.max-position-embeddings 128",
    ),
    (
        "_model_can_be_cut",
        {"parallel": ParallelConfig(tp=3)},
        "--parallel.tp: num_attention_heads 4 cannot be divided over tp 3",
    ),
    (
        "_model_can_be_cut",
        {"parallel": ParallelConfig(tp=4, sequence_parallel=True), "data": data(seq_length=126)},
        "--data.seq-length 126 cannot be divided over tp 4",
    ),
    (
        "_attention_has_a_kernel",
        {
            "model": dataclasses.replace(MODEL, sliding_window=100, attention_dropout=0.1),
            "device": "cuda",
        },
        "--model: attention_dropout 0.1 with a sliding_window of 100",
    ),
    (
        "_backend_can_do_it",
        {"backend": "transformer_engine", "device": "cpu"},
        "--backend transformer_engine runs on NVIDIA GPUs alone",
    ),
    (
        "_batch_can_be_cut",
        {"train": TrainConfig(global_batch_size=8, micro_batch_size=3)},
        "global-batch-size is 8",
    ),
    ("_batch_can_be_cut", {"parallel": ParallelConfig(dp=3)}, "data parallel size 3"),
    (
        "_pipeline_can_be_cut",
        {"parallel": ParallelConfig(pp=16)},
        "--parallel.pp 16: 16 stages of 1 chunks hold 16 pieces, but the model",
    ),
    (
        "_pipeline_can_be_cut",
        {"parallel": ParallelConfig(pp=2, virtual_stages=2)},
        "schedule 1f1b cannot serve 2 chunks per stage",
    ),
    (
        "_pipeline_can_be_cut",
        {"parallel": ParallelConfig(pp=2, layout="E t*9|t L")},
        "--parallel.layout: layout 'E t.9.t L' names t 10 times, but the model",
    ),
    (
        "_saving_knobs_have_a_folder",
        {"train": TrainConfig(save_interval=5)},
        "--train.save-interval 5 does nothing without --save",
    ),
    (
        "_saving_knobs_have_a_folder",
        {"train": TrainConfig(trace_step=5)},
        "--train.trace-step 5 has no place to write to without --save",
    ),
    (
        "_evaluation_has_data",
        {"train": TrainConfig(eval_interval=5), "data": data(split="1")},
        "--train.eval-interval 5 has no data",
    ),
    (
        "_evaluation_has_data",
        {"train": TrainConfig(eval_interval=5), "data": data(test=("other",))},
        "--train.eval-interval 5 has no data",
    ),
    (
        "_evaluation_has_data",
        {
            "train": TrainConfig(eval_interval=5),
            "data": DataConfig(sft=("chats",), seq_length=128),
            "tokenizer": "tok",
        },
        "--train.eval-interval 5 has no data: name some with --data.sft-valid",
    ),
    (
        "_evaluation_has_data",
        {
            "data": DataConfig(sft=("chats",), sft_valid=("held", "out"), seq_length=128),
            "tokenizer": "tok",
        },
        "--data.sft-valid held out does nothing without --train.eval-interval",
    ),
    (
        "_chats_have_a_tokenizer",
        {"data": DataConfig(sft=("chats",), seq_length=128)},
        "--data.sft needs the tokenizer",
    ),
    (
        "_attention_has_a_kernel",
        {
            "model": dataclasses.replace(MODEL, attention_dropout=0.1),
            "data": data(reset_attention_mask=True),
            "device": "cuda",
        },
        "attention_dropout 0.1 with documents that do not see each other",
    ),
    (
        "_master_weights_are_kept",
        {
            "parallel": ParallelConfig(data_parallel="fsdp2"),
            "precision": PrecisionConfig(master_weights="remainder"),
        },
        "--precision.master-weights remainder does nothing with --parallel.data-parallel fsdp2",
    ),
    (
        "_fp8_fits_the_model",
        {"precision": PrecisionConfig(fp8="current"), "parallel": ParallelConfig(tp=4)},
        "ffn-hidden-size over --parallel.tp is 24, but --precision.fp8 current needs a multiple",
    ),
]

SOUND: list[dict[str, Any]] = [
    {},
    {"precision": PrecisionConfig(fp8="rowwise"), "parallel": ParallelConfig(tp=2)},
    {"parallel": ParallelConfig(tp=4, sequence_parallel=True, dp=2)},
    {
        "parallel": ParallelConfig(data_parallel="fsdp2"),
        "precision": PrecisionConfig(moments="bf16"),
    },
    {"parallel": ParallelConfig(pp=2, schedule="zbv")},
    {"train": TrainConfig(save_interval=5), "save": "out"},
    {"train": TrainConfig(eval_interval=5)},
    {"train": TrainConfig(eval_interval=5), "data": data(valid=("other",))},
    {
        "train": TrainConfig(eval_interval=5),
        "data": DataConfig(sft=("chats",), sft_valid=("held out",), seq_length=128),
        "tokenizer": "tok",
    },
    {
        "train": TrainConfig(eval_interval=5),
        "data": DataConfig(synthetic=True, seq_length=128),
    },
]


@pytest.mark.parametrize(("rule", "changes", "message"), BROKEN)
def test_broken_rule_says_what_and_why(rule: str, changes: dict[str, Any], message: str) -> None:
    broken = run(**changes)
    with pytest.raises(ConfigError, match=message):
        validate_run(broken)
    [named] = [item for item in RUN_RULES if item.__name__ == rule]
    with pytest.raises(ConfigError, match=message):
        named(broken)


def test_every_rule_has_a_broken_case() -> None:
    assert {rule.__name__ for rule in RUN_RULES} == {rule for rule, _, _ in BROKEN}


@pytest.mark.parametrize("changes", SOUND)
def test_sound_config_passes(changes: dict[str, Any]) -> None:
    validate_run(run(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=0)}, "--model: vocab_size is 0"),
        ({"parallel": ParallelConfig(cp=2)}, "--parallel.cp is 2"),
        ({"precision": PrecisionConfig(dtype="fp32", min_loss_scale=2.0)}, "loss scale"),
        ({"optimizer": OptimizerConfig(lr=0.0)}, "--optimizer.lr is 0.0"),
        ({"optimizer": OptimizerConfig(warmup_steps=2000)}, "2000"),
        ({"data": DataConfig()}, "no training data"),
        ({"train": TrainConfig(steps=0)}, "--train.steps is 0"),
        ({"train": TrainConfig(steps=-3)}, "--train.steps is -3"),
        ({"train": TrainConfig(seed=-1)}, "--train.seed is -1"),
        ({"train": TrainConfig(hang_timeout_seconds=float("nan"))}, "hang-timeout-seconds is nan"),
        ({"parallel": ParallelConfig(dp=0)}, "--parallel.dp is 0"),
    ],
)
def test_rules_of_every_part_apply(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_run(run(**changes))
