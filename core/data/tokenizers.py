"""Tokenizers behind one small protocol: Hugging Face, SentencePiece, and plain bytes.

Nothing heavy is imported until a tokenizer is loaded. No special token is added by `encode`:
documents are set apart by `eod`, which preprocessing appends.
"""

import hashlib
import io
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from core.data.chat import NEEDED, ChatTemplate, Message, Rendered
from core.errors import DataError

_LONGEST_LINE = 1 << 30
"""Bytes of a line that SentencePiece learns from; by default it drops those above 4192 unsaid."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    """What it was loaded from."""
    vocab_size: int
    """One above the largest id."""
    bos: int | None
    """Beginning of sequence."""
    eos: int | None
    """End of sequence."""
    pad: int | None
    """Padding."""

    @property
    def fingerprint(self) -> str:
        """Another one for every tokenizer that makes other tokens of some text or chat."""

    @property
    def eod(self) -> int:
        """The token between documents.

        Raises:
            DataError: it has none.
        """

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to go on from, with the special tokens that the tokenizer
        itself puts before a text (Llama's `<s>`).
        """

    def chat(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """A chat by the tokenizer's template; see `ChatTemplate.render`.

        Raises:
            DataError: it has no template, or one that does not take the chat.
        """

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the next answer begins.

        Raises:
            DataError: likewise.
        """

    def chat_ends(self) -> frozenset[int]:
        """Tokens that the template ends an answer with; none where it does not tell."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer; code from the Hub is never run.

    Args:
        spec: `byte`, a SentencePiece `.model` file, a Hugging Face folder or `tokenizer.json`, or
            the id of a repository on the Hub.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    path = Path(spec).expanduser()
    if spec == "byte":
        return ByteTokenizer()
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.is_dir() and not any(path.glob("tokenizer*.json")):
        if (path / "tokenizer.model").is_file():
            return SentencePieceTokenizer(path / "tokenizer.model")
        raise DataError(
            f"--tokenizer {spec} has neither tokenizer.json, tokenizer_config.json nor "
            "tokenizer.model: name a folder that holds a tokenizer"
        )
    if path.exists() or (_HUB_ID.fullmatch(spec) and path.suffix != ".json"):
        return HuggingFaceTokenizer(path if path.exists() else spec)
    raise DataError(
        f"--tokenizer {spec} does not exist: give `byte`, a .model file, a folder, a "
        "tokenizer.json, or the id of a repository on the Hub"
    )


class _NoTemplate:
    """For tokenizers that know no chats."""

    name: str

    def chat(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """Raise a DataError."""
        raise DataError(f"--tokenizer {self.name} has no chat template, {NEEDED}")

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Raise a DataError."""
        return self.chat(messages).tokens.tolist()

    def chat_ends(self) -> frozenset[int]:
        """None."""
        return frozenset()


class ByteTokenizer(_NoTemplate):
    """UTF-8 bytes as they are, and one more token between documents."""

    name = fingerprint = "byte"
    vocab_size = 257
    eod = 256
    bos: int | None = None
    eos: int | None = 256
    pad: int | None = None

    def encode(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of several texts."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """The bytes of `text`."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes among `ids`; broken characters are marked."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer of the `transformers` library.

    Args:
        source: a folder, a `tokenizer.json`, or the id of a repository on the Hub.

    Raises:
        DataError: it cannot be loaded.
    """

    def __init__(self, source: str | Path) -> None:
        self.name = str(source)
        self._tokenizer = self._load(Path(source), self.name)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        self.bos: int | None = self._tokenizer.bos_token_id
        self.eos: int | None = self._tokenizer.eos_token_id
        self.pad: int | None = self._tokenizer.pad_token_id

    @cached_property
    def fingerprint(self) -> str:
        """Of the files that it would be saved as, chat template among them, and the library."""
        from transformers import __version__

        digest = hashlib.sha256(__version__.encode())
        with tempfile.TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
        return digest.hexdigest()

    @property
    def eod(self) -> int:
        """The end-of-sequence token.

        Raises:
            DataError: it has none.
        """
        return _eod(self.name, self.eos, "set eos_token in its tokenizer_config.json")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts; a fast tokenizer uses several threads."""
        if not texts:
            return []  # which transformers does not take
        # verbose=False: documents longer than the model's context are the rule here.
        ids = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return list(ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of `text` after the special tokens that the tokenizer puts before a text, an empty
        one too; those that it puts at an end are left out.
        """
        return [*self._before_text, *self.encode(text)]

    @cached_property
    def _before_text(self) -> list[int]:
        plain, whole = self.encode("a"), list(self._tokenizer("a", verbose=False)["input_ids"])
        starts = range(len(whole) - len(plain) + 1)
        found = (start for start in starts if whole[start : start + len(plain)] == plain)
        return whole[: next(found, 0)]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer, self.name)

    def chat(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """A chat by the tokenizer's template; see `ChatTemplate.render`."""
        return self._template.render(messages, tools)

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the next answer begins."""
        return self._template.prompt(messages)

    def chat_ends(self) -> frozenset[int]:
        """The token that the template ends an answer with, if it has one."""
        with suppress(DataError):
            return frozenset({self._template.end()})
        return frozenset()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @staticmethod
    def _load(path: Path, source: str) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            if path.is_file():
                beside = path.with_name("tokenizer_config.json")
                if path.name != "tokenizer.json" or not beside.is_file():
                    return PreTrainedTokenizerFast(tokenizer_file=str(path))
                path = path.parent
            return AutoTokenizer.from_pretrained(
                str(path) if path.exists() else source, trust_remote_code=False
            )
        except Exception as error:  # transformers and tokenizers raise bare Exceptions too
            cause = str(error).strip().split("\n")[0]
            raise DataError(f"--tokenizer {source} cannot be loaded: {cause}") from error


class SentencePieceTokenizer(_NoTemplate):
    """A SentencePiece `.model` file.

    Raises:
        DataError: it is missing, or no SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.name = str(path)
        if not Path(path).is_file():
            raise DataError(f"--tokenizer {path} does not exist")
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(Path(path).read_bytes())
        except RuntimeError as error:
            raise DataError(f"--tokenizer {path} is not a SentencePiece model") from error
        self.vocab_size = int(self._model.vocab_size())
        self.bos = _present(self._model.bos_id())
        self.eos = _present(self._model.eos_id())
        self.pad = _present(self._model.pad_id())

    @property
    def fingerprint(self) -> str:
        """Of the model."""
        return hashlib.sha256(self._model.serialized_model_proto()).hexdigest()

    @property
    def eod(self) -> int:
        """The end-of-sequence piece.

        Raises:
            DataError: it has none.
        """
        return _eod(self.name, self.eos, "train it with an eos piece")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special pieces."""
        return list(self._model.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts."""
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of `text`: as in corpora, without special pieces."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the pieces among `ids`: a model may have more rows than there are pieces."""
        return str(self._model.decode([i for i in ids if i < self.vocab_size]))


def train_sentencepiece(
    texts: Iterable[str],
    output: str | Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
) -> None:
    """Train a SentencePiece model that keeps every text as it is.

    No normalisation, spaces kept, digits apart, and bytes for what it has no piece for; ids are
    unk 0, bos 1, eos 2, no pad, as in Llama's.

    Args:
        texts: any number of documents; lines are learnt from.
        output: the `.model` file, written when all is done.
        vocab_size: pieces, with 256 bytes and 3 special ones among them.
        model_type: bpe or unigram.
        character_coverage: part of all characters that get pieces of their own.

    Raises:
        DataError: there is no text, it cannot fill the vocabulary, the vocabulary is too small for
            it, or the file cannot be written.
    """
    from sentencepiece import SentencePieceTrainer

    lines = (line for text in texts for line in text.splitlines() if line)
    first = next(lines, None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on: --input holds no character")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            max_sentence_length=_LONGEST_LINE,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        cause = str(error).strip().split("] ")[-1]  # without the place in SentencePiece's source
        raise DataError(f"no vocabulary of {vocab_size} can be trained: {cause}") from error
    aside = Path(f"{output}.{os.getpid()}.partial")
    try:
        try:
            aside.write_bytes(model.getvalue())
            aside.replace(output)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{output} cannot be written ({error.strerror}): free disk space, or choose another "
            "path"
        ) from error


def _present(piece: int) -> int | None:
    return int(piece) if piece >= 0 else None


def _eod(name: str, eos: int | None, remedy: str) -> int:
    if eos is None:
        raise DataError(
            f"--tokenizer {name} has no end-of-document token: {remedy}, or do without "
            "(--no-append-eod)"
        )
    return eos
