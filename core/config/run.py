"""Everything that a training run is told, and the rules that need more than one part of it."""

from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from core.config.backend import Backend, BackendUse, validate_backend
from core.config.data import DataConfig, parse_split, validate_data
from core.config.optimizer import OptimizerConfig, validate_optimizer
from core.config.parallel import ParallelConfig, validate_parallel
from core.config.precision import PrecisionConfig, validate_fp8, validate_precision
from core.config.train import TrainConfig, validate_batch_sizes, validate_train
from core.config.transformer import (
    TransformerConfig,
    validate_attention,
    validate_layout,
    validate_length,
    validate_transformer,
)
from core.errors import ConfigError, about
from core.pipeline.chosen import first_layout
from core.pipeline.costs import language_model_parts

ModelConfigT = TypeVar("ModelConfigT")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[ModelConfigT]):
    """Train a model."""

    preset: str | None = None
    """Published architecture to start from; single options of --model change it."""
    tokenizer: str | None = None
    """Tokenizer: a folder, a file, a Hugging Face Hub id, or `byte`."""
    init_from: str | None = None
    """Weights to start from at step 0: a local Hugging Face folder (`hf download` makes one), or a
    checkpoint of another run. Used when there is no checkpoint in --save or --load."""
    load: str | None = None
    """Checkpoint to go on from, step, optimizer and data included; used when there is none in
    --save."""
    save: str | None = None
    """Folder for checkpoints, metrics and this configuration. A run started again with the same
    folder goes on from its newest checkpoint."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    backend: Backend = "local"
    """What supplies the layers' parts: this project's own, or Transformer Engine (`pip install
    'tessera-zoo[te]'`). Checkpoints are the same, so a run may change it."""

    model: ModelConfigT
    """Architecture."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over processes."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation data."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training loop."""


def _sequence_fits_model(config: RunConfig[TransformerConfig]) -> None:
    validate_length(config.model, config.data.seq_length)


def _model_can_be_cut(config: RunConfig[TransformerConfig]) -> None:
    with about("--parallel.tp"):
        validate_layout(
            config.model,
            config.parallel.tp,
            sequence_parallel=config.parallel.sequence_parallel,
            seq_length=config.data.seq_length,
        )


def _pipeline_can_be_cut(config: RunConfig[TransformerConfig]) -> None:
    first_layout(language_model_parts(config.model, config.data.seq_length), config.parallel)


def _attention_has_a_kernel(config: RunConfig[TransformerConfig]) -> None:
    # What `auto` will find is not known here: the task looks again on its device.
    with about("--model"):
        validate_attention(
            config.model,
            config.device,
            seq_length=config.data.seq_length,
            separate_documents=config.data.separate_documents,
        )


def _backend_can_do_it(config: RunConfig[Any]) -> None:
    validate_backend(BackendUse(config.backend, config.precision, config.parallel, config.device))


def _batch_can_be_cut(config: RunConfig[Any]) -> None:
    # Without --parallel.dp the size follows from the number of processes, unknown here; a batch
    # that one rank cannot cut no number of ranks can.
    validate_batch_sizes(config.train, config.parallel.dp or 1)


def _saving_knobs_have_a_folder(config: RunConfig[Any]) -> None:
    if config.train.save_interval and config.save is None:
        raise ConfigError(
            f"--train.save-interval {config.train.save_interval} does nothing without --save: name "
            "a folder, or leave the interval out"
        )
    if config.train.trace_step is not None and config.save is None:
        raise ConfigError(
            f"--train.trace-step {config.train.trace_step} has no place to write to without "
            "--save: name a folder, or leave it out"
        )
    if config.train.allow_changed_data and config.save is None:
        raise ConfigError(
            "--train.allow-changed-data does nothing without --save, where a run goes on: leave "
            "it out"
        )


def _evaluation_has_data(config: RunConfig[Any]) -> None:
    data = config.data
    # A test set alone turns off the split, which would otherwise give a validation set.
    has_data = data.synthetic or data.valid or (not data.test and parse_split(data.split)[1] > 0)
    if data.sft:
        has_data = bool(data.sft_valid)
    if config.train.eval_interval and not has_data:
        remedy = "--data.valid, or give validation a weight in --data.split"
        raise ConfigError(
            f"--train.eval-interval {config.train.eval_interval} has no data: name some with "
            f"{'--data.sft-valid' if data.sft else remedy}"
        )
    if data.sft_valid and not config.train.eval_interval:
        raise ConfigError(
            f"--data.sft-valid {' '.join(data.sft_valid)} does nothing without "
            "--train.eval-interval: set it, or leave the chats out"
        )


def _chats_have_a_tokenizer(config: RunConfig[Any]) -> None:
    if config.data.sft and config.tokenizer is None:
        raise ConfigError(
            "--data.sft needs the tokenizer that renders its chats: name it with --tokenizer"
        )


def _master_weights_are_kept(config: RunConfig[Any]) -> None:
    if config.parallel.data_parallel == "fsdp2" and config.precision.master_weights != "full":
        raise ConfigError(
            f"--precision.master-weights {config.precision.master_weights} does nothing with "
            "--parallel.data-parallel fsdp2, whose parameters are fp32 themselves: leave it out"
        )


def _fp8_fits_the_model(config: RunConfig[TransformerConfig]) -> None:
    tokens = config.data.seq_length * config.train.micro_batch_size
    validate_fp8(config.precision, config.model, config.parallel, tokens)


RUN_RULES = (
    _sequence_fits_model,
    _model_can_be_cut,
    _pipeline_can_be_cut,
    _attention_has_a_kernel,
    _backend_can_do_it,
    _batch_can_be_cut,
    _saving_knobs_have_a_folder,
    _evaluation_has_data,
    _chats_have_a_tokenizer,
    _master_weights_are_kept,
    _fp8_fits_the_model,
)


def validate_run(config: RunConfig[TransformerConfig]) -> None:
    """Apply every rule that needs neither a file nor a process.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    with about("--model"):
        validate_transformer(config.model)
    validate_parallel(config.parallel)
    validate_precision(config.precision)
    validate_data(config.data)
    validate_train(config.train)
    validate_optimizer(config.optimizer, config.train.steps)
    for rule in RUN_RULES:
        rule(config)
