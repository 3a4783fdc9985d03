"""Samples for next-token prediction, drawn from one tokenised corpus."""

import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from core.data.gpt_index import (
    GPTIndex,
    build_gpt_index,
    plan_gpt_index,
    sample_index_dtype,
    shuffle_index_dtype,
)
from core.data.index_cache import cached_arrays
from core.data.indexed_dataset import IndexedDataset
from core.data.samples import Array, Sample, check_index, next_token_sample
from core.errors import DataError

_PAD = -1  # no token: what it covers is outside the loss, and shown to the model as token 0

_LENGTHS_IN_CHECKSUM = 1 << 20  # enough to tell corpora apart, and soon read


@dataclass(frozen=True, kw_only=True)
class GPTSampleOptions:
    """How documents become samples.

    Attributes:
        seq_length: tokens per sample.
        seed: of the shuffles, below 2^32.
        vocab_size: tokens must be below it.
        eod: end-of-document token; needed for `mask_eod_loss` only.
        mask_eod_loss: leave predictions made at an end-of-document token out of the loss.
        separate_documents: give the bounds of documents, and leave out of the loss the first token
            of a document that follows another.
        drop_last_partial: see `plan_gpt_index`.
        cache_dir: of the sample index; by default `cache/GPTDataset_indices` beside the corpus.
    """

    seq_length: int
    seed: int
    vocab_size: int
    eod: int | None = None
    mask_eod_loss: bool = False
    separate_documents: bool = False
    drop_last_partial: bool = True
    cache_dir: str | None = None


class GPTDataset:
    """Samples of `seq_length` tokens, cut from shuffled documents laid end to end.

    The order of samples is Megatron-LM's for the same corpus, seed, split and number of samples.
    Building is safe in any number of processes at once, with shared and with local disks. After
    pickling, files are reopened where the data set is first read.

    Args:
        corpus: tokens and documents (Megatron-LM's *sequences*).
        documents: of this split.
        num_samples: the least to provide, over as many epochs as it takes; None for one epoch.
        split: name of the split, for the cache.
        options: see there.

    Raises:
        DataError: no tokens or too few, or a cache directory that cannot be written to.
    """

    def __init__(
        self,
        corpus: IndexedDataset,
        documents: range,
        num_samples: int | None,
        split: str,
        options: GPTSampleOptions,
    ) -> None:
        self._corpus = corpus
        self._documents = documents
        self._requested = num_samples
        self._split = split
        self._options = options
        if options.mask_eod_loss and options.eod is None:
            raise DataError("--data.mask-eod-loss needs a tokenizer with an end-of-document token")
        if corpus.dtype.kind not in "iu":
            raise DataError(
                f"{corpus.prefix}.idx holds {corpus.dtype} numbers, which are no tokens"
            )
        try:
            self._plan = plan_gpt_index(
                corpus.tokens_between(documents.start, documents.stop),
                options.seq_length,
                num_samples,
                drop_last_partial=options.drop_last_partial,
            )
        except DataError as error:
            raise DataError(
                f"the {split} split of {corpus.prefix} (documents {documents.start} to "
                f"{documents.stop} of {len(corpus)}) gives no sample: {error}; change "
                "--data.split or --data.seq-length, or add text"
            ) from error
        self._index  # noqa: B018 - built here, before training starts, not at the first sample

    def __len__(self) -> int:
        return self._plan.num_samples

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_index"}

    def __getitem__(self, index: int) -> Sample:
        """`tokens` [s], `labels` [s] int64, `loss_mask` [s] bool, and with `separate_documents`
        `cu_seqlens`.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        check_index(index, len(self))
        text, ends = self._text(int(self._index.shuffle[index]))
        padded = text == _PAD
        text[padded] = 0
        sample = next_token_sample(text)
        sample["loss_mask"] &= ~padded[1:]
        if self._options.mask_eod_loss:
            sample["loss_mask"] &= sample["tokens"] != self._options.eod
        if self._options.separate_documents:
            s = self._options.seq_length
            sample["loss_mask"][ends[(ends > 0) & (ends <= s)] - 1] = False
            bounds = np.concatenate(([0], ends[ends < s], [s]))
            sample["cu_seqlens"] = np.unique(bounds).astype(np.int32)
        return sample

    @property
    def identifiers(self) -> dict[str, object]:
        """All that the index follows from.

        Counts are among them, so that a corpus written anew under the same name does not meet the
        index of its predecessor.
        """
        return {
            "class": type(self).__name__,
            "dataset_path": os.path.abspath(self._corpus.prefix),
            "num_samples": self._requested,
            "index_split": self._split,
            "random_seed": self._options.seed,
            "sequence_length": self._options.seq_length,
            "documents": [self._documents.start, self._documents.stop],
            "corpus_sequences": len(self._corpus),
            "corpus_tokens": self._corpus.num_tokens,
            "split_tokens": self._plan.tokens_per_epoch,
            "drop_last_partial_sequence": self._options.drop_last_partial,
        }

    @property
    def order(self) -> dict[str, object]:
        """All that the order of samples follows from, beside the seed; the same for a copy of the
        corpus at another path, and for another number of samples as long as the epochs agree.
        """
        lengths = self._corpus.sequence_lengths[:_LENGTHS_IN_CHECKSUM].tobytes()
        return {
            "corpus tokens": self._corpus.num_tokens,
            "corpus sequences": len(self._corpus),
            "checksum of sequence lengths": zlib.crc32(lengths),
            "documents of the split": [self._documents.start, self._documents.stop],
            "sequence length": self._options.seq_length,
            "epochs": self._plan.num_epochs,
            "samples": self._plan.num_samples,
            "samples before the last epoch": self._plan.separate_from,
        }

    def _text(self, sample: int) -> tuple[Array, Array]:
        """Tokens of a sample, [s + 1] int64, padded at the end if the corpus ends before it; and
        where in them documents end.
        """
        index = self._index
        (first, start), (last, end) = index.sample[sample : sample + 2].tolist()
        if first == last:
            parts = [self._corpus.read(int(index.document[first]), start, end - start + 1)]
        else:
            parts = [self._corpus.read(int(index.document[first]), start)]
            parts += [self._corpus.read(doc) for doc in index.document[first + 1 : last].tolist()]
            parts.append(self._corpus.read(int(index.document[last]), 0, end + 1))
        text = np.full(self._options.seq_length + 1, _PAD, dtype=np.int64)
        ends = np.cumsum([len(part) for part in parts])
        length = int(ends[-1])
        np.concatenate(parts, out=text[:length])
        # Seen as unsigned, a negative token of a corrupt corpus is a huge one.
        worst = text[text[:length].view(np.uint64).argmax()]
        if not 0 <= worst < self._options.vocab_size:
            raise DataError(
                f"{self._corpus.prefix}.bin holds token {worst}, but the vocabulary has "
                f"{self._options.vocab_size}: tokenise it again with this run's --tokenizer"
            )
        return text, ends

    @cached_property
    def _index(self) -> GPTIndex:
        directory = self._options.cache_dir
        if directory is None:
            beside = Path(self._corpus.prefix).parent / "cache"
            directory = str(beside / f"{type(self).__name__}_indices")
        plan = self._plan
        positions = plan.num_epochs * len(self._documents)
        arrays = cached_arrays(
            Path(directory),
            f"{type(self).__name__}-{self._split}",
            self.identifiers,
            {
                "document_index": (np.dtype(np.int32), (positions,)),
                "sample_index": (sample_index_dtype(positions), (plan.num_samples + 1, 2)),
                "shuffle_index": (shuffle_index_dtype(plan.num_samples), (plan.num_samples,)),
            },
            self._build,
        )
        return GPTIndex(arrays["document_index"], arrays["sample_index"], arrays["shuffle_index"])

    def _build(self) -> dict[str, Array]:
        lengths = np.array(self._corpus.sequence_lengths)  # aligned, and read once
        total = int(lengths[self._documents.start : self._documents.stop].sum(dtype=np.int64))
        if total != self._plan.tokens_per_epoch or lengths.min() < 0:
            raise DataError(
                f"{self._corpus.prefix}.idx is corrupt: lengths sum to {total} tokens where "
                f"offsets span {self._plan.tokens_per_epoch}"
            )
        index = build_gpt_index(lengths, self._documents, self._plan, self._options.seed)
        return {
            "document_index": index.document,
            "sample_index": index.sample,
            "shuffle_index": index.shuffle,
        }
