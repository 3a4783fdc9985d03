"""Which text a run reads, how it is cut into samples, and how it is loaded."""

from dataclasses import dataclass, fields

from core.errors import ConfigError

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokenised corpora (`.bin/.idx`, as Megatron-LM's) or chats, and how samples are drawn."""

    train: tuple[str, ...] = ()
    """Corpora by path prefix (`corpus` for corpus.bin and corpus.idx), or weight and prefix in
    turn: `30 a 70 b`. Without weights, several corpora are mixed by their size."""
    valid: tuple[str, ...] = ()
    """Corpora of the validation set. With neither this nor `test`, `train` is split."""
    test: tuple[str, ...] = ()
    """Corpora of the test set."""
    split: str = "969,30,1"
    """Weights of training, validation and test set when only `train` is given: each corpus is cut
    by document, in this order."""
    sft: tuple[str, ...] = ()
    """Chats for supervised fine-tuning, in place of corpora: JSON Lines with `messages`, rendered
    by the tokenizer's chat template, or with `prompt` and `completion`. The loss counts answers
    only."""
    sft_valid: tuple[str, ...] = ()
    """Chats of the validation set."""
    sft_packing: bool = True
    """Put several chats into a sample, which then do not see each other; otherwise each is padded
    to a sample of its own."""
    sft_drop_long: bool = False
    """Leave out chats longer than a sample, and say how many, instead of ending with an error."""
    seq_length: int = 1024
    """Tokens per sample that the model sees; one more is read, for the last label."""
    cache_dir: str | None = None
    """Where sample indices and rendered chats are kept from run to run; by default in `cache`
    beside each corpus, or the first file of chats. May be shared by all nodes or local to each."""
    mask_eod_loss: bool = False
    """Leave out of the loss what the model predicts at an end-of-document token."""
    reset_attention_mask: bool = False
    """A token sees its own document alone, and positions begin again in each, as Megatron-LM's
    --reset-attention-mask with --reset-position-ids; what the last token of a document says of the
    next one is left out of the loss."""
    keep_partial_valid: bool = False
    """Pad the tokens left over at the end of the validation set to one more sample, as
    Megatron-LM's `drop_last_partial_validation_sequence=False`; it changes the order of samples."""
    num_workers: int = 2
    """Loader processes per rank; 0 loads in the training process, without prefetching."""
    prefetch: int = 2
    """Steps that each loader process keeps ready."""
    synthetic: bool = False
    """Random tokens in place of corpora, for benchmarks."""

    @property
    def separate_documents(self) -> bool:
        """Whether samples hold several documents that attention must not cross."""
        return self.reset_attention_mask or (bool(self.sft) and self.sft_packing)


@dataclass(frozen=True)
class Blend:
    """Corpora of one data set, and their weights where the user gave some."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(entries: tuple[str, ...], option: str) -> Blend:
    """Tell `a b` (corpora) from `30 a 70 b` (weight and corpus in turn).

    Args:
        entries: the option's values.
        option: its name, for the error.

    Raises:
        ConfigError: weights and corpora do not alternate, or a weight is not positive.
    """
    numbers = [_number(entry) for entry in entries]
    if all(number is None for number in numbers):
        return Blend(entries, None)
    alternate = len(entries) % 2 == 0 and all(
        (number is not None) == (position % 2 == 0) for position, number in enumerate(numbers)
    )
    if not alternate:
        raise ConfigError(
            f"{option} {' '.join(entries)}: give every corpus a weight before it, as in "
            "`30 a 70 b`, or none of them"
        )
    weights = tuple(number for number in numbers if number is not None)
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"{option} {' '.join(entries)}: every weight must be above 0")
    return Blend(entries[1::2], weights)


def parse_split(split: str) -> tuple[float, ...]:
    """The three weights of `--data.split`; left-out ones are 0.

    Raises:
        ConfigError: not one to three numbers of at least 0, some above.
    """
    numbers = [_number(part) for part in split.split(",")]
    weights = [number for number in numbers if number is not None and 0 <= number < float("inf")]
    if len(weights) != len(numbers) or len(weights) > len(SPLIT_NAMES) or not sum(weights):
        raise ConfigError(
            f"--data.split is {split!r}: give up to three weights for train, valid and test, "
            "as in 969,30,1"
        )
    return tuple(weights + [0.0] * (len(SPLIT_NAMES) - len(weights)))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _sizes_are_possible(config: DataConfig) -> None:
    for name, least in (("seq_length", 1), ("num_workers", 0), ("prefetch", 1)):
        value = getattr(config, name)
        if value < least:
            option = name.replace("_", "-")
            raise ConfigError(f"--data.{option} is {value}: it must be at least {least}")


def _source_is_named(config: DataConfig) -> None:
    given = [f"--data.{name}" for name in SPLIT_NAMES if getattr(config, name)]
    if config.sft and (given or config.synthetic):
        raise ConfigError(
            f"--data.sft trains on chats, and {(*given, '--data.synthetic')[0]} on something else: "
            "leave one out"
        )
    if config.synthetic and given:
        raise ConfigError(
            f"--data.synthetic reads no corpus, but {given[0]} names one: leave one out"
        )
    if not config.synthetic and not config.train and not config.sft:
        raise ConfigError(
            "no training data: name a corpus with --data.train (python -m core.data.preprocess "
            "makes one) or chats with --data.sft, or use --data.synthetic"
        )


_OF_CORPORA = ("mask_eod_loss", "reset_attention_mask", "keep_partial_valid")
_OF_CHATS = ("sft_valid", "sft_packing", "sft_drop_long")


def _options_suit_the_source(config: DataConfig) -> None:
    default = DataConfig()

    def refuse(name: str, reason: str) -> None:
        if getattr(config, name) != getattr(default, name):
            no = "no-" if getattr(default, name) is True else ""
            option = f"--data.{no}{name.replace('_', '-')}"
            raise ConfigError(f"{option} does nothing {reason}: leave it out")

    if config.synthetic:
        refuse("reset_attention_mask", "with --data.synthetic, which has no documents")
    for name in _OF_CORPORA if config.sft else ():
        refuse(name, "with --data.sft, which reads no corpus")
    for name in () if config.sft else _OF_CHATS:
        refuse(name, "without --data.sft")


def _blends_are_readable(config: DataConfig) -> None:
    for name in SPLIT_NAMES:
        parse_blend(getattr(config, name), f"--data.{name}")


def _split_is_used(config: DataConfig) -> None:
    parse_split(config.split)
    default = {field.name: field.default for field in fields(config)}["split"]
    if config.split != default and (config.valid or config.test or config.synthetic or config.sft):
        raise ConfigError(
            f"--data.split {config.split} does nothing with --data.valid, --data.test, --data.sft "
            "or --data.synthetic: leave one out"
        )


DATA_RULES = (
    _sizes_are_possible,
    _source_is_named,
    _options_suit_the_source,
    _blends_are_readable,
    _split_is_used,
)


def validate_data(config: DataConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in DATA_RULES:
        rule(config)
