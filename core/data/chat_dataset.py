"""Samples for supervised fine-tuning: chats packed into rows, loss on the answers alone."""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.data.chat import Rendered, read_records, render
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
    """

    seq_length: int
    seed: int
    vocab_size: int
    packing: bool
    drop_long: bool


class ChatDataset:
    """Samples of `seq_length` tokens that hold whole chats, one after another, and padding.

    Attention does not cross from one chat to another where several are packed (`cu_seqlens`), so a
    chat counts the same wherever it lies. Rows are filled once, from chats in an order that follows
    from the seed, and come in another order every epoch. All tokens are held in memory.

    Args:
        files: JSON Lines.
        tokenizer: a `Tokenizer`.
        num_samples: the least to provide, over as many epochs as it takes.
        option: that names the files, for errors.
        options: see there.

    Raises:
        DataError: a file that cannot be read, a chat that cannot be rendered, has no token to be
            learnt or does not fit, or no chat at all.
    """

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Any,
        num_samples: int,
        option: str,
        options: ChatOptions,
    ) -> None:
        self._options = options
        chats = list(_read(files, tokenizer, option, options))
        if not chats:
            raise DataError(f"{option} {' '.join(map(str, files))}: there is no chat in it")
        self._tokens = np.concatenate([chat.tokens for chat in chats])
        self._trained = np.concatenate([chat.trained for chat in chats])
        lengths = np.array([len(chat.tokens) for chat in chats], dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(lengths)))
        order = np.random.default_rng(options.seed).permutation(len(chats))
        rows = [[int(chat)] for chat in order]
        if options.packing:
            # A chat's last token is a label only.
            rows = fill_rows(order, lengths - 1, options.seq_length)
        self._members = np.array([chat for row in rows for chat in row], dtype=np.int64)
        self._row_starts = np.cumsum([0, *(len(row) for row in rows)])
        epochs = -(-max(num_samples, 1) // len(rows))
        self._order = np.concatenate(
            [
                np.random.default_rng((options.seed, epoch)).permutation(len(rows))
                for epoch in range(epochs)
            ]
        )

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
            first, end = self._starts[chat : chat + 2]
            at = slice(bounds[-1], bounds[-1] + end - first - 1)
            tokens[at] = self._tokens[first : end - 1]
            labels[at] = self._tokens[first + 1 : end]
            loss_mask[at] = self._trained[first + 1 : end]
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
            "chats": len(self._starts) - 1,
            "checksum of tokens": zlib.crc32(self._tokens.tobytes()),
            "checksum of answers": zlib.crc32(self._trained.tobytes()),
            "sequence length": self._options.seq_length,
            "rows": len(self._row_starts) - 1,
        }


def _read(
    files: Sequence[Path], tokenizer: Any, option: str, options: ChatOptions
) -> Iterator[Rendered]:
    total = dropped = 0
    for path in files:
        for place, record in read_records(path):
            total += 1
            with about(place):
                chat = render(record, tokenizer)
                needed = len(chat.tokens) - 1
                if needed > options.seq_length and options.drop_long:
                    dropped += 1
                    continue
                _check(chat, needed, options)
            yield chat
    if dropped:
        _LOG.warning(
            "%s: %d of %d chats are left out, for they do not fit in --data.seq-length %d",
            option,
            dropped,
            total,
            options.seq_length,
        )


def _check(chat: Rendered, needed: int, options: ChatOptions) -> None:
    if not chat.num_trained:
        raise DataError(
            "it has no token to be learnt: a chat needs a message of the assistant, with the "
            "chat template's own name for that role"
        )
    if needed > options.seq_length:
        raise DataError(
            f"its {needed} tokens do not fit in --data.seq-length {options.seq_length}, and a cut "
            "chat would lose its answer: raise it, or leave such chats out with "
            "--data.sft-drop-long"
        )
    worst = int(chat.tokens.max())
    if worst >= options.vocab_size:
        raise DataError(
            f"it holds token {worst}, but the vocabulary has {options.vocab_size}: use the model's "
            "own --tokenizer, or raise --model.vocab-size"
        )


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
