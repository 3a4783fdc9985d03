from typing import Any

import pytest

from core.config.train import (
    BatchRampConfig,
    TrainConfig,
    validate_batch_sizes,
    validate_train,
)
from core.errors import ConfigError


def test_defaults_are_valid() -> None:
    validate_train(TrainConfig())
    validate_batch_sizes(TrainConfig(), 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "--train.steps is 0: it must be at least 1"),
        ({"micro_batch_size": 0}, "--train.micro-batch-size is 0"),
        ({"gc_interval": -1}, "--train.gc-interval is -1: it must be at least 0"),
        ({"exit_duration_minutes": 0.0}, "--train.exit-duration-minutes is 0.0"),
        ({"exit_at_step": 0}, "--train.exit-at-step is 0: it must be from 1 to --train.steps 1000"),
        ({"trace_step": 0}, "--train.trace-step is 0: it must be from 1 to --train.steps 1000"),
        ({"trace_step": 9, "steps": 8}, "--train.trace-step is 9: .* from 1 to --train.steps 8"),
        ({"label_smoothing": 1.0}, "--train.label-smoothing is 1.0: it must be at least 0"),
        ({"eval_steps": 3}, "--train.eval-steps 3 does nothing without"),
        ({"keep_every": 10}, "--train.keep-every 10 does nothing without --train.save-interval"),
        ({"async_save": False}, "--train.no-async-save does nothing without --train.save-inter"),
        ({"keep_every": 10, "save_interval": 4}, "--train.keep-every 10 is no multiple"),
        ({"keep_every": 8, "save_interval": 4, "keep_last": 0}, "does nothing with --train.keep-l"),
        ({"track": ("wandb", "wandb")}, "name each tracker once"),
        ({"ramp": BatchRampConfig(samples=8)}, "do nothing without --train.ramp.start"),
        ({"ramp": BatchRampConfig(start=2)}, "each must be at least 1"),
        ({"ramp": BatchRampConfig(start=2, increment=4, samples=9)}, "must give --train.global-b"),
        ({"ramp": BatchRampConfig(start=8, increment=1, samples=9)}, "must give --train.global-b"),
    ],
)
def test_rules(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate_train(TrainConfig(**options))


def test_batches_are_cut_evenly() -> None:
    ramp = BatchRampConfig(start=4, increment=4, samples=100)
    config = TrainConfig(global_batch_size=16, micro_batch_size=2, ramp=ramp)
    validate_train(config)
    validate_batch_sizes(config, 2)
    with pytest.raises(ConfigError, match=r"--train.ramp.start is 4, .* = 8 does not divide"):
        validate_batch_sizes(config, 4)
    with pytest.raises(ConfigError, match=r"global-batch-size is 16, .* = 6 does not divide"):
        validate_batch_sizes(config, 3)


def test_the_ramp_goes_up_in_equal_parts() -> None:
    ramp = BatchRampConfig(start=4, increment=4, samples=90)
    config = TrainConfig(steps=20, global_batch_size=16, ramp=ramp)
    sizes, consumed = [], 0
    for _ in range(config.steps):
        sizes.append(config.global_batch_size_at(consumed))
        consumed += sizes[-1]
    assert sizes == [4] * 8 + [8] * 4 + [12] * 3 + [16] * 5
    assert config.num_train_samples() == consumed
    assert TrainConfig(steps=7, global_batch_size=5).num_train_samples() == 35


def test_a_run_whose_batch_shrank_needs_what_it_has_consumed_and_the_rest() -> None:
    assert TrainConfig(steps=10, global_batch_size=2).num_train_samples(8, 64) == 68
    ramp = BatchRampConfig(start=4, increment=4, samples=90)
    config = TrainConfig(steps=20, global_batch_size=16, ramp=ramp)
    assert config.num_train_samples(8, 32) == config.num_train_samples()
    assert config.num_train_samples(19, 80) == 80 + 12


def test_validation_samples_are_needed_only_for_evaluation() -> None:
    assert TrainConfig().num_valid_samples == 0
    config = TrainConfig(eval_interval=5, eval_steps=3, global_batch_size=4)
    assert config.num_valid_samples == 12
