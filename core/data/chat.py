"""Chats as tokens, with the tokens that a model is to learn.

These are the answers, up to and including what ends them. A template that puts its answers between
`{% generation %}` and `{% endgeneration %}` says so itself; of any other, the rendering of the
messages up to an answer is compared with that of the whole chat.
"""

import re
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


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file, each with its file and line.

    Raises:
        DataError: it cannot be read, or a line is no JSON object.
    """
    if not set(path.suffixes) & set(JSON_SUFFIXES):
        raise DataError(f"{path} is no JSON Lines: chats are read from .jsonl files")
    for chunk in read_chunks(path, "messages"):
        for number, line in zip(count(chunk.first), chunk.items):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            yield place, json_object(line, place)


def render(record: Mapping[str, Any], tokenizer: Any) -> Rendered:
    """Tokens of a chat (`messages`, and `tools` if the template takes them) or of a `prompt` and
    its `completion`.

    Args:
        record: one line of a data set.
        tokenizer: a `Tokenizer`; chats need one with a chat template.

    Raises:
        DataError: the record has neither, or the template cannot render it.
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
            raise DataError(
                f"--tokenizer {name} has no chat template: take the tokenizer of a chat model, or "
                "data of prompt and completion"
            )
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

    def render(self, messages: Sequence[Message], tools: Any = None) -> Rendered:
        """Tokens of a whole chat, and which of them are answers.

        Raises:
            DataError: the template refuses it, or does not tell where the answers are, or ends them
                with nothing that a model could learn to stop by.
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
        spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = ""
            if place:
                before = self._text(messages[:place], tools, add_generation_prompt=True)
            after = self._text(messages[: place + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"the chat template of {self._name} renders messages otherwise when others "
                    f"follow (message {place + 1}), so that answers cannot be found by comparison: "
                    "put them between {% generation %} and {% endgeneration %} in the template"
                )
            spans.append((len(before), len(after)))
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
            ends = [place for place in inside if tokens[place] == self._eos]
            last = ends[-1] if ends else max(inside, default=-1)
            for place in inside:
                trained[place] = place <= last
        return tokens, trained

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
                if not self._special.intersection(tokens[first:place]):
                    raise DataError(
                        f"the chat template of {self._name} ends an answer with no special token, "
                        "so that a model would never learn to stop: let it put one there, and "
                        "inside of {% generation %} if it has that"
                    )
                first = None
