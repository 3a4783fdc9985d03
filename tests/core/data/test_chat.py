import json
from pathlib import Path
from typing import Any

import pytest

from core.data.chat import read_records, render
from core.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from core.errors import DataError
from core.testing.chat_tokenizers import CHATML, CHATML_TAGGED, save_chat_tokenizer

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if loop.last else m['content'].split('!')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
HALF_TAGGED = CHATML_TAGGED.replace(
    "<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"
)
TEMPLATES = {
    "chatml": CHATML,
    "tagged": CHATML_TAGGED,
    "tags without the end": HALF_TAGGED,
    "default system": DEFAULT_SYSTEM + CHATML,
    "inst": INST,
    "forgetful": FORGETFUL,
    "endless": ENDLESS,
    "tagged, endless": ENDLESS.replace(
        "{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceTokenizer]:
    root = tmp_path_factory.mktemp("chat")
    return {
        name: HuggingFaceTokenizer(save_chat_tokenizer(root / name, template))
        for name, template in TEMPLATES.items()
    }


def _chat(*turns: str) -> dict[str, Any]:
    """Turns `u text`, `a text`, `s text`."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def _answers(tokenizer: HuggingFaceTokenizer, record: dict[str, Any]) -> list[str]:
    """Text of every run of learnt tokens."""
    rendered = render(record, tokenizer)
    assert len(rendered.tokens) == len(rendered.trained)
    runs: list[list[int]] = []
    for before, (token, learnt) in zip(
        [False, *rendered.trained],
        zip(rendered.tokens, rendered.trained, strict=True),
        strict=False,
    ):
        if learnt:
            runs = [*runs, []] if not before else runs
            runs[-1].append(int(token))
    return [tokenizer.decode(run) for run in runs]


MULTI = _chat("u hi", "a hello world", "u more\n\nplease", "a \n🙂 here")


@pytest.mark.parametrize("name", ["chatml", "tagged", "tags without the end", "default system"])
def test_answers_and_their_ends_are_learnt(
    name: str, tokenizers: dict[str, HuggingFaceTokenizer]
) -> None:
    tokenizer = tokenizers[name]
    expected = ["hello world<|im_end|>", "\n🙂 here<|im_end|>"]
    assert _answers(tokenizer, MULTI) == expected
    with_system = {"messages": [*_chat("s short")["messages"], *MULTI["messages"]]}
    assert _answers(tokenizer, with_system) == expected
    assert _answers(tokenizer, _chat("u a", "a b", "u c")) == ["b<|im_end|>"]
    assert _answers(tokenizer, _chat("a first", "u c", "a last"))[-1] == "last<|im_end|>"


def test_the_whole_text_is_that_of_the_template(
    tokenizers: dict[str, HuggingFaceTokenizer],
) -> None:
    rendered = render(_chat("u hi", "a yo"), tokenizers["chatml"])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert tokenizers["chatml"].decode(rendered.tokens.tolist()) == text
    assert (
        rendered.tokens.tolist()
        == render(_chat("u hi", "a yo"), tokenizers["tagged"]).tokens.tolist()
    )
    assert rendered.num_trained == len(tokenizers["chatml"].encode("yo")) + 1
    prompt = tokenizers["chatml"].chat_prompt([{"role": "user", "content": "hi"}])
    assert rendered.tokens[: len(prompt)].tolist() == prompt
    assert not rendered.trained[: len(prompt)].any()
    assert rendered.trained[len(prompt)]


def test_another_template(tokenizers: dict[str, HuggingFaceTokenizer]) -> None:
    tokenizer = tokenizers["inst"]
    assert _answers(tokenizer, _chat("u hi", "a yo", "u x", "a y")) == [
        " yo<|im_end|>",
        " y<|im_end|>",
    ]
    with pytest.raises(DataError, match="does not take it: no system turns here"):
        render(_chat("s no", "u hi", "a yo"), tokenizer)


def test_a_template_that_changes_its_mind_is_refused(
    tokenizers: dict[str, HuggingFaceTokenizer],
) -> None:
    tokenizer = tokenizers["forgetful"]
    assert _answers(tokenizer, _chat("u hi", "a why! so")) == ["why! so<|im_end|>"]
    with pytest.raises(DataError, match=r"otherwise when others follow \(message 2\)"):
        render(_chat("u hi", "a why! so", "u x", "a y"), tokenizer)


@pytest.mark.parametrize("name", ["endless", "tagged, endless"])
def test_answers_without_an_end_are_refused(
    name: str, tokenizers: dict[str, HuggingFaceTokenizer]
) -> None:
    with pytest.raises(DataError, match="would never learn to stop"):
        render(_chat("u hi", "a yo"), tokenizers[name])


def test_prompt_and_completion_need_no_template() -> None:
    rendered = render({"prompt": "ab", "completion": "cd"}, ByteTokenizer())
    assert rendered.tokens.tolist() == [97, 98, 99, 100, 256]
    assert rendered.trained.tolist() == [False, False, True, True, True]
    with pytest.raises(DataError, match="byte has no chat template"):
        render(_chat("u hi"), ByteTokenizer())


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "neither messages nor a text prompt and completion, only keys 'text'"),
        ({"messages": []}, "neither messages"),
        ({"prompt": ["x"], "completion": ["y"]}, "neither messages"),
        ({"messages": [{"role": "user", "content": "x"}, "y"]}, "message 2 is no object"),
        ({"messages": [{"content": "x"}]}, "message 1 is no object with a role"),
    ],
)
def test_records_that_are_no_chats(
    record: dict[str, Any], message: str, tokenizers: dict[str, HuggingFaceTokenizer]
) -> None:
    with pytest.raises(DataError, match=message):
        render(record, tokenizers["chatml"])


def test_a_tokenizer_without_template(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save_chat_tokenizer(tmp_path, None))
    with pytest.raises(DataError, match="has no chat template"):
        render(MULTI, tokenizer)


def test_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(MULTI) + "\n\n[1]\n")
    records = read_records(path)
    assert next(records) == (f"{path}:1", MULTI)
    with pytest.raises(DataError, match=r"chats\.jsonl:3 holds list"):
        next(records)
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:1 is not a JSON object"):
        next(read_records(path))
    for name in ("chats.txt", "chats.parquet"):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match="is no JSON Lines"):
            next(read_records(tmp_path / name))
