"""How long a run trains, on how many samples a step, and what it reports, evaluates and saves."""

from dataclasses import dataclass, field
from typing import Literal

from core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """A global batch that grows in equal steps at the start of a run (Brown et al., GPT-3, 2020).

    It depends on consumed samples alone, so it is the same at every layout and after a resume.
    """

    start: int = 0
    """Samples of the first global batch; 0 turns the ramp off."""
    increment: int = 0
    """Samples that each stage of the ramp adds."""
    samples: int = 0
    """Consumed samples at which the ramp reaches the global batch size."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int = 1000
    """Optimizer steps of the whole run, those before a resume included."""
    global_batch_size: int = 8
    """Samples per step over all ranks."""
    micro_batch_size: int = 1
    """Samples that one rank runs forward and backward at a time; gradients are accumulated over
    global_batch_size / (micro_batch_size * dp) of these."""
    ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    """Global batch size at the start of the run."""
    seed: int = 1234
    """Of initial weights, dropout and the order of samples."""
    label_smoothing: float = 0.0
    """Share of the training target that all tokens of the vocabulary divide among them (Szegedy et
    al., 2016); evaluation is without it."""
    eval_interval: int = 0
    """Steps between evaluations on the validation set; 0 turns evaluation off. The last step is
    always evaluated then."""
    eval_steps: int = 10
    """Global batches of one evaluation: the same samples every time."""
    log_interval: int = 1
    """Steps between rows of the metrics log, and between lines where there is no terminal."""
    save_interval: int = 0
    """Steps between checkpoints in --save; 0 saves at the end only, and on SIGTERM."""
    keep_last: int = 2
    """Checkpoints kept, the newest; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept beside them; 0 for none."""
    async_save: bool = True
    """Write the checkpoints of save_interval in the background, from a copy in host memory as large
    as what this rank writes; those that end a run are waited for."""
    exit_at_step: int | None = None
    """Save and exit with status 0 after this step; schedules still run over all `steps`, so the
    same command without it goes on."""
    exit_duration_minutes: float | None = None
    """Save and exit with status 0 once the run has taken this long."""
    deterministic: bool = False
    """Only deterministic GPU kernels: a resumed run repeats the uninterrupted one bit by bit."""
    trace_step: int | None = None
    """Write when each forward and backward pass of this step ran to pipeline_trace.json in --save,
    which `python -m core.pipeline show --from-trace` draws. Not the first step, which may compile
    kernels."""
    track: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = ()
    """Where metrics go beside the JSONL file in --save; needs `pip install 'tessera-zoo[track]'`.
    wandb talks to its server unless WANDB_MODE=offline; the others write local files."""
    gc_interval: int = 100
    """Steps between runs of Python's garbage collector, on all ranks at once; 0 leaves it alone."""
    hang_timeout_seconds: float = 600.0
    """A rank that passes no step border for this long ends the run and says where it stood; 0 turns
    that off. The first step, which may compile kernels, and a save count as one step each."""
    sigterm_grace_seconds: float = 25.0
    """A rank that has reached no step border this long after SIGTERM, being stuck in a collective
    say, leaves with status 143 and does not save; a save that has begun is not cut short. 0 waits
    for as long as it takes. torchrun kills after 30 s: for longer steps raise its
    --shutdown-timeout as well."""
    allow_changed_data: bool = False
    """Go on from a checkpoint in --save although samples come in another order than before, so that
    some may be seen twice and others never. The order follows from seed, corpora (not their paths),
    weights, split, sequence length, and the epochs that --train.steps takes."""

    def global_batch_size_at(self, consumed_samples: int) -> int:
        """Samples of the step that begins at this number of consumed samples."""
        ramp = self.ramp
        if ramp.start == 0 or consumed_samples >= ramp.samples:
            return self.global_batch_size
        stages = (self.global_batch_size - ramp.start) // ramp.increment
        return ramp.start + ramp.increment * (consumed_samples * stages // ramp.samples)

    def num_train_samples(self, done: int = 0, consumed: int = 0) -> int:
        """Samples that the whole run consumes, the first `done` steps having consumed so many: not
        as many as now, where the global batch was another then.
        """
        for step in range(done, self.steps):
            if self.ramp.start == 0 or consumed >= self.ramp.samples:
                return consumed + (self.steps - step) * self.global_batch_size
            consumed += self.global_batch_size_at(consumed)
        return consumed

    @property
    def num_valid_samples(self) -> int:
        """Samples of the validation set that an evaluation reads."""
        return self.eval_steps * self.global_batch_size if self.eval_interval else 0


def _numbers_are_possible(config: TrainConfig) -> None:
    at_least_one = ("steps", "global_batch_size", "micro_batch_size", "eval_steps", "log_interval")
    at_least_zero = (
        "eval_interval",
        "save_interval",
        "keep_last",
        "keep_every",
        "gc_interval",
        "hang_timeout_seconds",
        "sigterm_grace_seconds",
    )
    for least, names in ((1, at_least_one), (0, at_least_zero)):
        for name in names:
            if not getattr(config, name) >= least:  # also where it is not a number
                raise ConfigError(
                    f"--train.{name.replace('_', '-')} is {getattr(config, name)}: it must be at "
                    f"least {least}"
                )
    if not 0 <= config.seed < 2**32:
        raise ConfigError(f"--train.seed is {config.seed}: it must be at least 0 and below 2^32")
    if not 0.0 <= config.label_smoothing < 1.0:
        raise ConfigError(
            f"--train.label-smoothing is {config.label_smoothing}: it must be at least 0 and "
            "below 1"
        )
    if config.exit_at_step is not None and not 1 <= config.exit_at_step <= config.steps:
        raise ConfigError(
            f"--train.exit-at-step is {config.exit_at_step}: it must be from 1 to --train.steps "
            f"{config.steps}"
        )
    if config.trace_step is not None and not 1 <= config.trace_step <= config.steps:
        raise ConfigError(
            f"--train.trace-step is {config.trace_step}: it must be from 1 to --train.steps "
            f"{config.steps}"
        )
    if config.exit_duration_minutes is not None and not config.exit_duration_minutes > 0:
        raise ConfigError(
            f"--train.exit-duration-minutes is {config.exit_duration_minutes}: it must be above 0"
        )


def _ramp_reaches_the_batch(config: TrainConfig) -> None:
    ramp = config.ramp
    if ramp.start == 0:
        if ramp != BatchRampConfig():
            raise ConfigError(
                "--train.ramp.increment and --train.ramp.samples do nothing without "
                "--train.ramp.start: set it, or leave them out"
            )
        return
    if min(ramp.start, ramp.increment, ramp.samples) < 1:
        raise ConfigError(
            f"--train.ramp.start, .increment and .samples are {ramp.start}, {ramp.increment} and "
            f"{ramp.samples}: each must be at least 1"
        )
    rest = config.global_batch_size - ramp.start
    if rest <= 0 or rest % ramp.increment:
        raise ConfigError(
            f"--train.ramp.start {ramp.start} plus a multiple of --train.ramp.increment "
            f"{ramp.increment} must give --train.global-batch-size {config.global_batch_size}"
        )


def _kept_checkpoints_exist(config: TrainConfig) -> None:
    if config.keep_every and not config.save_interval:
        raise ConfigError(
            f"--train.keep-every {config.keep_every} does nothing without --train.save-interval: "
            "set it, or leave keep-every out"
        )
    if config.keep_every and config.keep_last == 0:
        raise ConfigError(
            f"--train.keep-every {config.keep_every} does nothing with --train.keep-last 0, which "
            "keeps every checkpoint: raise keep-last, or leave keep-every out"
        )
    if config.keep_every and config.keep_every % config.save_interval:
        raise ConfigError(
            f"--train.keep-every {config.keep_every} is no multiple of --train.save-interval "
            f"{config.save_interval}: no checkpoint would be kept at it"
        )


def _saving_in_the_background_has_something_to_do(config: TrainConfig) -> None:
    if not config.async_save and not config.save_interval:
        raise ConfigError(
            "--train.no-async-save does nothing without --train.save-interval, as the save at the "
            "end is waited for in any case: leave it out"
        )


def _evaluation_knobs_do_something(config: TrainConfig) -> None:
    if config.eval_interval == 0 and config.eval_steps != TrainConfig().eval_steps:
        raise ConfigError(
            f"--train.eval-steps {config.eval_steps} does nothing without --train.eval-interval: "
            "set it, or leave eval-steps out"
        )


def _trackers_are_named_once(config: TrainConfig) -> None:
    if len(set(config.track)) < len(config.track):
        raise ConfigError(f"--train.track {' '.join(config.track)}: name each tracker once")


TRAIN_RULES = (
    _numbers_are_possible,
    _ramp_reaches_the_batch,
    _kept_checkpoints_exist,
    _saving_in_the_background_has_something_to_do,
    _evaluation_knobs_do_something,
    _trackers_are_named_once,
)


def validate_train(config: TrainConfig) -> None:
    """Apply every rule that needs no layout.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in TRAIN_RULES:
        rule(config)


def validate_batch_sizes(config: TrainConfig, dp: int) -> None:
    """Check that every global batch of the run is cut evenly into microbatches on `dp` ranks.

    Raises:
        ConfigError: one is not.
    """
    unit = config.micro_batch_size * dp
    sizes = {
        "global-batch-size": config.global_batch_size,
        "ramp.start": config.ramp.start,
        "ramp.increment": config.ramp.increment,
    }
    for option, size in sizes.items():
        if size % unit:
            raise ConfigError(
                f"--train.{option} is {size}, which --train.micro-batch-size "
                f"{config.micro_batch_size} times the data parallel size {dp} = {unit} does not "
                f"divide: choose a multiple of {unit}"
            )
