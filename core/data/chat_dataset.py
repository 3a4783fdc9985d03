"""Samples for supervised fine-tuning: chats packed into rows, loss on the answers alone."""

import hashlib
import inspect
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import core.data.chat as chat_module
import core.data.tokenizers as tokenizers_module
from core.data.chat import Rendered, read_records, render
from core.data.index_cache import Layout, cached_arrays
from core.data.samples import Array, Sample, check_index
from core.errors import DataError, about

_OPEN_ROWS = 256
"""Rows that a chat may still be put into; more would fill them a little better, and take longer."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How chats become samples.

    Attributes:
        seq_length: tokens per sample.
        seed: of the order.
        vocab_size: tokens must be below it.
        packing: put several chats into a sample.
        drop_long: leave out chats that do not fit in a sample, instead of refusing them.
        cache_dir: of the rendered chats; by default `cache/ChatDataset_indices` beside the first
            file.
    """

    seq_length: int
    seed: int
    vocab_size: int
    packing: bool
    drop_long: bool
    cache_dir: str | None = None


class ChatDataset:
    """Samples of `seq_length` tokens that hold whole chats, one after another, and padding.

    Attention does not cross from one chat to another where several are packed (`cu_seqlens`), so a
    chat counts the same wherever it lies. Rows are filled once, from chats in an order that follows
    from the seed, and come in another order every epoch.

    Chats are rendered by the first process of all that share the cache directory, and in no later
    run on the same files with the same tokenizer, whatever the other options; a template that names
    today's date goes on with that of the first day. All processes of a node map the same tokens.

    Args:
        files: JSON Lines.
        tokenizer: a `Tokenizer`.
        num_samples: the least to provide, over as many epochs as it takes.
        option: that names the files, for errors.
        options: see there.

    Raises:
        DataError: a file that cannot be read, a chat that cannot be rendered, has no token to be
            learnt or does not fit, no chat at all, or a cache directory that cannot be written to.
    """

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Any,
        num_samples: int,
        option: str,
        options: ChatOptions,
    ) -> None:
        self._files, self._tokenizer, self._option = files, tokenizer, option
        self._options = options
        self._identifiers = _identifiers(files, tokenizer)
        chats = self._fitting()
        if not len(chats):
            raise DataError(f"{option} {' '.join(map(str, files))}: there is no chat in it")
        order = chats[np.random.default_rng(options.seed).permutation(len(chats))]
        rows = [[int(chat)] for chat in order]
        if options.packing:
            # A chat's last token is a label only.
            rows = fill_rows(order, self._chats.lengths - 1, options.seq_length)
        self._members = np.array([chat for row in rows for chat in row], dtype=np.int64)
        self._row_starts = np.cumsum([0, *(len(row) for row in rows)])
        epochs = -(-max(num_samples, 1) // len(rows))
        self._order = np.concatenate(
            [
                np.random.default_rng((options.seed, epoch)).permutation(len(rows))
                for epoch in range(epochs)
            ]
        )

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_chats"}

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        """`tokens` [s], `labels` [s] int64, `loss_mask` [s] bool, and with packing `cu_seqlens`,
        whose last document is the padding, if there is some.
        """
        check_index(index, len(self))
        s, row = self._options.seq_length, self._order[index]
        tokens, labels = np.zeros(s, dtype=np.int64), np.zeros(s, dtype=np.int64)
        loss_mask, bounds = np.zeros(s, dtype=np.bool_), [0]
        for chat in self._members[self._row_starts[row] : self._row_starts[row + 1]]:
            first, end = self._chats.starts[chat : chat + 2].tolist()
            at = slice(bounds[-1], bounds[-1] + end - first - 1)
            tokens[at] = self._chats.tokens[first : end - 1]
            labels[at] = self._chats.tokens[first + 1 : end]
            loss_mask[at] = self._chats.trained[first + 1 : end]
            bounds.append(at.stop)
        sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}
        if self._options.packing:
            sample["cu_seqlens"] = np.array(sorted({*bounds, s}), dtype=np.int32)
        return sample

    @property
    def order(self) -> dict[str, object]:
        """All that the order of samples follows from, beside the seed; a longer run begins as a
        shorter one does.
        """
        return {
            "chats": len(self._members),
            "checksum of tokens": zlib.crc32(self._chats.tokens.data),
            "checksum of answers": zlib.crc32(self._chats.trained.data),
            "sequence length": self._options.seq_length,
            "rows": len(self._row_starts) - 1,
        }

    @cached_property
    def _chats(self) -> "_Chats":
        directory = self._options.cache_dir
        if directory is None:
            directory = str(self._files[0].parent / "cache" / f"{type(self).__name__}_indices")
        arrays = cached_arrays(
            Path(directory),
            type(self).__name__,
            self._identifiers,
            _LAYOUT,
            lambda: vars(_render(self._files, self._tokenizer)),
        )
        return _Chats(**arrays)

    def _fitting(self) -> Array:
        """Numbers of the chats that fit in a sample.

        Raises:
            DataError: one does not, unless such chats are to be left out; or a token is outside the
                vocabulary.
        """
        chats, options = self._chats, self._options
        needed = chats.lengths - 1
        long = np.flatnonzero(needed > options.seq_length)
        if len(long) and not options.drop_long:
            raise DataError(
                f"{self._place(long[0])}: its {needed[long[0]]} tokens do not fit in "
                f"--data.seq-length {options.seq_length}, and a cut chat would lose its answer "
                f"({len(long)} of {len(needed)} chats are too long, and the longest needs "
                f"{needed.max()}): raise it, or leave such chats out with --data.sft-drop-long"
            )
        outside = np.flatnonzero(chats.tokens >= options.vocab_size)
        if len(outside):
            chat = int(np.searchsorted(chats.starts, outside[0], side="right")) - 1
            raise DataError(
                f"{self._place(chat)}: it holds token {chats.tokens[outside[0]]}, but the "
                f"vocabulary has {options.vocab_size}: use the model's own --tokenizer, or raise "
                "--model.vocab-size"
            )
        if len(long):
            _LOG.warning(
                "%s: %d of %d chats are left out, for they do not fit in --data.seq-length %d",
                self._option,
                len(long),
                len(needed),
                options.seq_length,
            )
        return np.flatnonzero(needed <= options.seq_length)

    def _place(self, chat: int) -> str:
        file, line = self._chats.places[chat].tolist()
        return f"{self._files[file]}:{line}"


@dataclass(frozen=True)
class _Chats:
    """Chats as tokens, laid end to end."""

    tokens: Array
    """[t] int32."""
    trained: Array
    """[t] bool: the tokens that are learnt."""
    starts: Array
    """[n + 1] int64: where each chat begins, and t."""
    places: Array
    """[n, 2] int64: file and line of each chat."""

    @property
    def lengths(self) -> Array:
        """[n] int64."""
        return np.diff(self.starts)


_LAYOUT: Layout = {
    "tokens": (np.dtype(np.int32), (None,)),
    "trained": (np.dtype(np.bool_), (None,)),
    "starts": (np.dtype(np.int64), (None,)),
    "places": (np.dtype(np.int64), (None, 2)),
}


def _identifiers(files: Sequence[Path], tokenizer: Any) -> dict[str, object]:
    """All that the tokens follow from, the code that makes them included: what an older version
    kept must not outlive a correction.
    """
    code = "".join(inspect.getsource(module) for module in (chat_module, tokenizers_module))
    found = []
    for path in files:
        try:
            with path.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
    return {
        "class": ChatDataset.__name__,
        "files": found,
        "tokenizer": tokenizer.fingerprint,
        "code": hashlib.sha256(code.encode()).hexdigest(),
    }


def _render(files: Sequence[Path], tokenizer: Any) -> _Chats:
    chats, places = [], []
    for number, path in enumerate(files):
        for line, record in read_records(path):
            with about(f"{path}:{line}"):
                chats.append(_learnable(record, tokenizer))
            places.append((number, line))
    starts = np.cumsum([0, *(len(chat.tokens) for chat in chats)], dtype=np.int64)
    tokens, trained = np.zeros(starts[-1], np.int32), np.zeros(starts[-1], np.bool_)
    for (first, end), chat in zip(pairwise(starts.tolist()), chats, strict=True):
        tokens[first:end], trained[first:end] = chat.tokens, chat.trained
    return _Chats(tokens, trained, starts, np.array(places, dtype=np.int64).reshape(-1, 2))


def _learnable(record: Mapping[str, Any], tokenizer: Any) -> Rendered:
    chat = render(record, tokenizer)
    if not chat.num_trained:
        raise DataError(
            "it has no token to be learnt: a chat needs a message of the assistant, with the "
            "chat template's own name for that role"
        )
    return chat


def fill_rows(order: Array, lengths: Array, size: int) -> list[list[int]]:
    """Put items into rows of a size, each into the first of the last rows that has room for it.

    Args:
        order: numbers of the items.
        lengths: of each item, at most `size`.
        size: of a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, list[int]]] = []
    for item in order.tolist():
        length = int(lengths[item])
        for place, (left, row) in enumerate(room):
            if length <= left:
                row.append(item)
                room[place] = (left - length, row)
                break
        else:
            rows.append([item])
            room = [*room[-(_OPEN_ROWS - 1) :], (size - length, rows[-1])]
        room = [one for one in room if one[0] > 0]
    return rows
