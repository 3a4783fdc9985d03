"""From `DataConfig` to the training, validation and test set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.config.data import SPLIT_NAMES, Blend, DataConfig, parse_blend, parse_split, validate_data
from core.data.blend import BlendedDataset, normalize, samples_per_source
from core.data.chat_dataset import ChatDataset, ChatOptions
from core.data.documents import expand_inputs
from core.data.gpt_dataset import GPTDataset, GPTSampleOptions
from core.data.indexed_dataset import IndexedDataset
from core.data.samples import SampleDataset
from core.data.synthetic import SyntheticDataset
from core.data.tokenizers import Tokenizer
from core.errors import ConfigError

Datasets = tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]


def build_datasets(
    config: DataConfig,
    *,
    vocab_size: int,
    eod: int | None,
    num_samples: Sequence[int],
    seed: int,
    tokenizer: Tokenizer | None = None,
) -> Datasets:
    """Open corpora and build their sample indices. Call it before any process group waits.

    Args:
        config: see there.
        vocab_size: every token must be below it, checked when it is read.
        eod: end-of-document token, if the tokenizer has one.
        num_samples: the least number of samples of the training, validation and test set; where
            it is 0, the set is None.
        seed: of the order of samples, and of synthetic ones.
        tokenizer: renders chats (`--data.sft`).

    Raises:
        ConfigError: options that do not work, or leave a wanted set without text.
        DataError: a corpus that is missing, damaged or too small.
    """
    validate_data(config)
    options = GPTSampleOptions(
        seq_length=config.seq_length,
        seed=seed,
        vocab_size=vocab_size,
        eod=eod,
        mask_eod_loss=config.mask_eod_loss,
        separate_documents=config.reset_attention_mask,
        cache_dir=config.cache_dir,
    )
    train, valid, test = (
        _Split(config, position, count, options, tokenizer).build() if count else None
        for position, count in enumerate(num_samples)
    )
    return train, valid, test


@dataclass(frozen=True)
class _Split:
    """One of the three sets."""

    config: DataConfig
    position: int
    num_samples: int
    options: GPTSampleOptions
    tokenizer: Tokenizer | None = None

    def build(self) -> SampleDataset:
        if self.config.synthetic:
            return SyntheticDataset(
                num_samples=self.num_samples,
                seq_length=self.options.seq_length,
                vocab_size=self.options.vocab_size,
                seed=self.options.seed,
                stream=self.position,
            )
        if self.config.sft:
            return self._chats()
        blend = self._blend()
        if len(blend.prefixes) == 1 and (blend.weights is None or self._own_corpora):
            return self._source(blend.prefixes[0], self.num_samples)
        weights: Sequence[float]
        sources: list[GPTDataset] = []
        if blend.weights is None:
            # One epoch of each, as long as that is enough; else every corpus is repeated.
            sources = [self._source(prefix, None) for prefix in blend.prefixes]
            weights = [len(source) for source in sources]
            shares = normalize(weights)
        else:
            # The blend normalises them again, as Megatron-LM does: it may change the last bit.
            weights = shares = normalize(blend.weights)
        if self.num_samples > sum(map(len, sources)):
            counts = samples_per_source(shares, self.num_samples)
            sources = [
                self._source(prefix, count)
                for prefix, count in zip(blend.prefixes, counts, strict=True)
            ]
        beside = Path(blend.prefixes[0]).parent / "cache" / f"{BlendedDataset.__name__}_indices"
        return BlendedDataset(sources, weights, self.num_samples, self.config.cache_dir or beside)

    def _chats(self) -> ChatDataset:
        name = ("sft", "sft_valid", "")[self.position]
        option = f"--data.{name.replace('_', '-')}"
        files: tuple[str, ...] = getattr(self.config, name, ())
        if not files:
            raise ConfigError(
                f"{self.num_samples} samples of a {self._name} set are wanted, but no chats are "
                f"named for it: name some with --data.sft-valid, or turn this evaluation off"
            )
        if self.tokenizer is None:
            raise ConfigError(f"{option} needs a tokenizer: name it with --tokenizer")
        options = ChatOptions(
            seq_length=self.config.seq_length,
            seed=self.options.seed,
            vocab_size=self.options.vocab_size,
            packing=self.config.sft_packing,
            drop_long=self.config.sft_drop_long,
            cache_dir=self.config.cache_dir,
        )
        paths = expand_inputs(files, option)
        return ChatDataset(paths, self.tokenizer, self.num_samples, option, options)

    @property
    def _name(self) -> str:
        return SPLIT_NAMES[self.position]

    @property
    def _own_corpora(self) -> bool:
        """Whether the sets are of different corpora, and none is split."""
        return bool(self.config.valid or self.config.test)

    def _blend(self) -> Blend:
        name = self._name if self._own_corpora else "train"
        entries: tuple[str, ...] = getattr(self.config, name)
        if not entries:
            raise ConfigError(
                f"{self.num_samples} samples of a {self._name} set are wanted, but --data.{name} "
                "names no corpus: name one, or turn this evaluation off"
            )
        return parse_blend(entries, f"--data.{name}")

    def _source(self, prefix: str, num_samples: int | None) -> GPTDataset:
        corpus = IndexedDataset(prefix)
        begin, end = 0.0, 1.0
        if not self._own_corpora:
            fractions = normalize(parse_split(self.config.split))
            begin, end = (sum(fractions[: self.position + past]) for past in (0, 1))
            if begin == end:
                raise ConfigError(
                    f"{self.num_samples} samples of a {self._name} set are wanted, but "
                    f"--data.split {self.config.split} leaves it no documents: give it a weight"
                    f"{', or turn this evaluation off' if self.position else ''}"
                )
        documents = range(round(begin * len(corpus)), round(end * len(corpus)))
        keep_partial = self._name == "valid" and self.config.keep_partial_valid
        options = replace(self.options, drop_last_partial=not keep_partial)
        return GPTDataset(corpus, documents, num_samples, self._name, options)
