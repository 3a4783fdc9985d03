"""The data of a run, built before its processes meet: for a large corpus it may take long."""

from collections.abc import Sequence
from typing import Any

from core.config.run import RunConfig
from core.data.tokenizers import load_tokenizer
from core.errors import ConfigError
from core.training.data_order import check_same_order, consumed_before
from core.training.task import TrainTask


def make_datasets(task: TrainTask, config: RunConfig[Any]) -> Sequence[Any]:
    """Training, validation and test set for the whole run. May take long for a large corpus.

    Raises:
        DataError: a corpus or tokenizer that is missing or damaged.
        ConfigError: a tokenizer larger than the vocabulary, or other data than that which the run
            in --save was trained on.
    """
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    vocab_size = getattr(task.model_config, "vocab_size", None)
    if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {config.tokenizer} has {tokenizer.vocab_size} tokens, but "
            f"--model.vocab-size is {vocab_size}: use the model's own tokenizer, or raise the size"
        )
    train = config.train
    # Never fewer than a run would have had from its start: an older checkpoint may have to do.
    samples = max(train.num_train_samples(), train.num_train_samples(*consumed_before(config)))
    counts = (samples, train.num_valid_samples, 0)
    datasets = task.make_datasets(config.data, tokenizer, counts, train.seed)
    check_same_order(config, datasets[0])
    return datasets
