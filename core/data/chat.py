"""Chats as tokens, with the tokens that a model is to learn.

These are the answers, up to and including what ends them. A template that puts its answers between
`{% generation %}` and `{% endgeneration %}` says so itself; of any other, the rendering of the
messages up to an answer is compared with that of the whole chat.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from core.data.documents import JSON_SUFFIXES, json_object, read_chunks
from core.data.samples import Array
from core.errors import DataError

Message = Mapping[str, Any]

NEEDED = (
    "which messages need: take the tokenizer of a chat model, or plain text (data of prompt and "
    "completion, generation without --chat)"
)
"""What to do without a chat template."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """One example for supervised fine-tuning."""

    tokens: Array
    """[n] int32."""
    trained: Array
    """[n] bool: the tokens that are learnt."""

    @property
    def num_trained(self) -> int:
        """Tokens that are learnt; the first never is, as nothing comes before it."""
        return int(self.trained[1:].sum())


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a JSONL file, each with its line.

    Raises:
        DataError: it cannot be read, or a line is no JSON object.
    """
    if not set(path.suffixes) & set(JSON_SUFFIXES):
        raise DataError(f"{path} is no JSON Lines: chats are read from .jsonl files")
    for chunk in read_chunks(path, "messages"):
        for number, line in zip(count(chunk.first), chunk.items):
            if not line.strip():
                continue
            yield number, json_object(line, f"{path}:{number}")


def render(record: Mapping[str, Any], tokenizer: Any) -> Rendered:
    """Tokens of a chat (`messages`, and `tools` if the template takes them) or of a `prompt` and
    its `completion`.

    Args:
        record: one line of a data set.
        tokenizer: a `Tokenizer`; chats need one with a chat template.

    Raises:
        DataError: the record has neither, an answer is absent, or the template cannot render it.
    """
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        before = tokenizer.encode_prompt(prompt)
        after = [*tokenizer.encode(completion), tokenizer.eod]
        return _rendered([*before, *after], [False] * len(before) + [True] * len(after))
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"it has neither messages nor a text prompt and completion, only keys "
            f"{', '.join(map(repr, record))}"
        )
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} is no object with a role")
        if (
            message["role"] == "assistant"
            and message.get("content") is None
            and not message.get("tool_calls")
        ):
            raise DataError(f"message {number} is an answer without content")
    rendered: Rendered = tokenizer.chat(messages, record.get("tools"))
    return rendered


def _rendered(tokens: Sequence[int], trained: Sequence[Any]) -> Rendered:
    return Rendered(np.array(tokens, dtype=np.int32), np.array(trained, dtype=np.bool_))


class ChatTemplate:
    """The chat template of a tokenizer of the `transformers` library.

    Args:
        tokenizer: the library's own.
        name: of the tokenizer, for errors.

    Raises:
        DataError: it has no template, or no character offsets.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        if not tokenizer.chat_template:
            raise DataError(f"--tokenizer {name} has no chat template, {NEEDED}")
        if not tokenizer.is_fast:
            raise DataError(
                f"--tokenizer {name} does not tell which characters a token stands for: take one "
                "with a tokenizer.json"
            )
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)
        self._eos: int | None = tokenizer.eos_token_id  # a look-up that is slow

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat up to where the next answer begins.

        Raises:
            DataError: the template refuses it.
        """
        text = self._text(messages, None, add_generation_prompt=True)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def end(self) -> int:
        """The token that ends an answer, which need not be the tokenizer's end of a sequence.

        Raises:
            DataError: see `render`.
        """
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        probe = self.render(chat)
        place = self._end_among(probe.tokens.tolist(), np.flatnonzero(probe.trained).tolist())
        assert place is not None, "render sees to it"
        return int(probe.tokens[place])

    def render(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """Tokens of a whole chat, and which of them are answers.

        Raises:
            DataError: the template refuses it, leaves out a part of an answer, does not tell where
                the answers are, or ends them with nothing that a model could learn to stop by.
        """
        template = self._tokenizer.get_chat_template(tools=tools)
        if _GENERATION_TAG.search(template):
            tokens, trained = self._tagged(messages, tools)
        else:
            tokens, trained = self._compared(messages, tools)
        self._train_ends(tokens, trained)
        return _rendered(tokens, trained)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # jinja's errors, and whatever a template's functions raise
            cause = str(error).strip().split("\n")[0]
            raise DataError(
                f"the chat template of {self._name} does not take it: {cause}"
            ) from error

    def _text(self, messages: Sequence[Message], tools: Any, **options: Any) -> str:
        with self._refusals():
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, **options
                )
            )

    def _tagged(self, messages: Sequence[Message], tools: Any) -> tuple[list[int], list[bool]]:
        with self._refusals():
            found = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        return list(found["input_ids"]), [bool(part) for part in found["assistant_masks"]]

    def _compared(self, messages: Sequence[Message], tools: Any) -> tuple[list[int], list[bool]]:
        whole = self._text(messages, tools)
        spans = [
            self._span(whole, messages, place, tools)
            for place, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        tokens, trained = list(encoded["input_ids"]), [False] * len(encoded["input_ids"])
        for first, end in spans:
            # A token that is in part the answer's is learnt too.
            inside = [
                place
                for place, (start, stop) in enumerate(encoded["offset_mapping"])
                if start < end and stop > first
            ]
            # What the template puts after the end of an answer is not the model's to say.
            last = self._end_among(tokens, inside)
            for place in inside:
                trained[place] = last is None or place <= last
        return tokens, trained

    def _span(
        self, whole: str, messages: Sequence[Message], place: int, tools: Any
    ) -> tuple[int, int]:
        """Where in the text of a whole chat the answer of message `place` begins and ends."""
        before = ""
        if place:
            before = self._text(messages[:place], tools, add_generation_prompt=True)
        after = self._text(messages[: place + 1], tools)
        end: int | None = len(after)
        if not whole.startswith(after):
            end = self._end_in_history(whole, after, messages, place, tools)
        if end is None or not (after.startswith(before) and whole.startswith(before)):
            raise DataError(
                f"the chat template of {self._name} renders messages otherwise when others "
                f"follow (message {place + 1}), so that answers cannot be found by comparison: "
                "put them between {% generation %} and {% endgeneration %} in the template"
            )
        for part, text in _beside_content(messages[place]):
            if text not in whole[len(before) : end]:
                raise DataError(
                    f"the chat template of {self._name} leaves out the {part} of message "
                    f"{place + 1}, which would not be learnt: remove it, or take a template that "
                    "renders it"
                )
        return len(before), end

    def _end_in_history(
        self, whole: str, after: str, messages: Sequence[Message], place: int, tools: Any
    ) -> int | None:
        """Where an answer ends that has something before its content only as long as nothing
        follows (Qwen3's thoughts, empty ones too). None if the content is not all there.

        What follows the content is found by rendering another one in its place.
        """
        content = messages[place].get("content")
        if not isinstance(content, str):
            return None
        other = {**messages[place], "content": "0" if content.endswith("1") else "1"}
        until = [*messages[:place], other]
        rest = _common_end(whole, self._text([*until, *messages[place + 1 :]], tools))
        tail = _common_end(after, self._text(until, tools))
        stop = len(whole) - len(rest)
        if whole[:stop].rstrip().endswith(content.strip()) and whole.startswith(tail, stop):
            return stop + len(tail)
        return None

    def _end_among(self, tokens: Sequence[int], places: Sequence[int]) -> int | None:
        """The place of the token that ends an answer: the last end of a sequence, else the last
        special token, if nothing but white space comes after it.
        """
        ends = [place for place in places if tokens[place] == self._eos]
        if ends:
            return ends[-1]
        special = [place for place in places if tokens[place] in self._special]
        if not special:
            return None
        rest = [tokens[place] for place in places if place > special[-1]]
        return None if self._tokenizer.decode(rest).strip() else special[-1]

    def _train_ends(self, tokens: list[int], trained: list[bool]) -> None:
        """Train the end of a sequence that follows an answer, if the template's tags leave it out;
        and see that every answer has an end.
        """
        for place in range(1, len(tokens)):
            if trained[place - 1] and tokens[place] == self._eos:
                trained[place] = True
        first = None
        for place, is_trained in enumerate([*trained, False]):
            if is_trained:
                first = place if first is None else first
            elif first is not None:
                if self._end_among(tokens, range(first, place)) is None:
                    raise DataError(
                        f"the chat template of {self._name} ends an answer with no special token, "
                        "so that a model would never learn to stop: let it put one there, and "
                        "inside of {% generation %} if it has that"
                    )
                first = None


def _beside_content(message: Message) -> Iterator[tuple[str, str]]:
    """What an answer says beside its content: a name for it, and text that must be seen of it."""
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            yield key, message[key].strip()
    for call in message.get("tool_calls") or []:
        name = call.get("function", call).get("name") if isinstance(call, dict) else None
        yield "tool_calls", name if isinstance(name, str) else ""


def _common_end(a: str, b: str) -> str:
    """The longest text that both end with."""
    lengths = range(1, min(len(a), len(b)) + 1)
    length = bisect_left(lengths, True, key=lambda n: a[-n:] != b[-n:])
    return a[len(a) - length :]
