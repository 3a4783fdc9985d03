"""Text from tokens that come one by one."""

from collections.abc import Collection, Sequence
from typing import IO, Protocol

_BROKEN = "\ufffd"


class Decoder(Protocol):
    """The half of a tokenizer that is needed here."""

    def decode(self, ids: list[int], /) -> str:
        """Text of tokens."""


class TextStream:
    """Turns tokens into text as they come, whole characters only.

    A token's text depends on what stands before it (the first piece of a SentencePiece text loses
    its space) and a character may be spread over several tokens. So the last tokens that gave text
    are decoded again together with the new ones, and what is new of that is the text.
    """

    def __init__(self, decoder: Decoder, context: list[int] | None = None) -> None:
        """Start after `context`, the tokens before, whose text is not given again."""
        self._decoder = decoder
        self._ids = list(context or [])
        self._start, self._done = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that a token completes; empty within a character."""
        self._ids.append(token)
        text = self._new()
        if text.endswith(_BROKEN):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text

    def finish(self) -> str:
        """What is left: a character whose end never came, marked as broken."""
        return self._new() if self._done < len(self._ids) else ""

    def _new(self) -> str:
        before = self._decoder.decode(self._ids[self._start : self._done])
        return self._decoder.decode(self._ids[self._start :])[len(before) :]


class Printer:
    """Writes the answers to several prompts one below the other: the first that is not over as it
    comes, the next ones when it is their turn.
    """

    def __init__(
        self, out: IO[str], streams: Sequence[TextStream], headings: Sequence[str]
    ) -> None:
        """Begin.

        Args:
            out: such as the terminal.
            streams: of each row.
            headings: what is written before each answer, such as its prompt.
        """
        self._out, self._streams = out, list(streams)
        self._waiting = list(headings)
        self._over = [False] * len(self._streams)
        self._turn = 0
        self._flush()

    def add(self, tokens: Sequence[int | None], ends: Collection[int] = ()) -> None:
        """Take the next token of every row; None for rows that are over. Ends are not written."""
        for row, token in enumerate(tokens):
            if token is None or token in ends:
                self._end(row)
            else:
                self._waiting[row] += self._streams[row].add(token)
        self._flush()

    def finish(self) -> None:
        """Write all that is left."""
        for row in range(len(self._streams)):
            self._end(row)
        self._flush()

    def _end(self, row: int) -> None:
        if not self._over[row]:
            self._waiting[row] += self._streams[row].finish() + "\n"
            self._over[row] = True

    def _flush(self) -> None:
        while self._turn < len(self._streams):
            self._out.write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._over[self._turn]:
                break
            self._turn += 1
        self._out.flush()
