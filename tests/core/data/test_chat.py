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
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last and loop.index0 > ns.last %}<think>\n"
    "{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1] }}"
    "{% for call in m['tool_calls'] %}[call {{ call['function']['name'] }}]{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen3's: the last answer alone has thoughts before it, empty ones too."""
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
    "thinking": THINKING,
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
    """Turns `u text`, `a text`, `s text`, `t text`."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
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


def test_thoughts_that_only_the_last_answer_has(
    tokenizers: dict[str, HuggingFaceTokenizer],
) -> None:
    """What the template puts before an answer may go once others follow; nothing of the answer."""
    tokenizer, empty = tokenizers["thinking"], "<think>\n\n</think>\n\n"
    assert _answers(tokenizer, _chat("u hi", "a yo")) == [f"{empty}yo<|im_end|>"]
    chat = _chat("s be good", "u hi", "a yo1", "u x", "a \n🙂 here")
    assert _answers(tokenizer, chat) == ["yo1<|im_end|>", f"{empty}\n🙂 here<|im_end|>"]
    called = _chat("u hi", "a ", "t sunny", "a so")
    called["messages"][1]["tool_calls"] = [{"function": {"name": "weather", "arguments": {}}}]
    assert _answers(tokenizer, called) == ["[call weather]<|im_end|>", f"{empty}so<|im_end|>"]
    with pytest.raises(DataError, match=r"otherwise when others follow \(message 2\)"):
        render(_chat("u hi", "a <think>why</think>yo", "u x", "a y"), tokenizer)


def test_parts_of_an_answer_that_the_template_leaves_out(
    tokenizers: dict[str, HuggingFaceTokenizer],
) -> None:
    chat = _chat("u hi", "a yo", "u x", "a y")
    chat["messages"][3]["reasoning_content"] = "because"
    assert "because" in _answers(tokenizers["thinking"], chat)[1]
    with pytest.raises(DataError, match="leaves out the reasoning_content of message 4"):
        render(chat, tokenizers["chatml"])
    chat["messages"][1]["reasoning_content"] = "so it goes"
    with pytest.raises(DataError, match="leaves out the reasoning_content of message 2"):
        render(chat, tokenizers["thinking"])
    called = _chat("u hi", "a ", "t sunny", "a so")
    called["messages"][1]["tool_calls"] = [{"function": {"name": "weather", "arguments": {}}}]
    with pytest.raises(DataError, match="leaves out the tool_calls of message 2"):
        render(called, tokenizers["chatml"])


def test_an_end_that_is_not_the_tokenizers(tmp_path: Path) -> None:
    """Base models are tuned with templates whose end their tokenizer does not end texts with."""
    folder = save_chat_tokenizer(tmp_path / "base", eos_token="<|im_start|>")
    tokenizer = HuggingFaceTokenizer(folder)
    assert _answers(tokenizer, MULTI) == ["hello world<|im_end|>", "\n🙂 here<|im_end|>"]
    assert [tokenizer.decode([end]) for end in tokenizer.chat_ends()] == ["<|im_end|>"]


def test_ends_of_answers(tokenizers: dict[str, HuggingFaceTokenizer], tmp_path: Path) -> None:
    for name, tokenizer in tokenizers.items():
        ends = [tokenizer.decode([end]) for end in tokenizer.chat_ends()]
        assert ends == ([] if "endless" in name else ["<|im_end|>"])
    assert not ByteTokenizer().chat_ends()
    plain = HuggingFaceTokenizer(save_chat_tokenizer(tmp_path, None))
    assert not plain.chat_ends()


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
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "message 1 is an answer without content",
        ),
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
    assert next(records) == (1, MULTI)
    with pytest.raises(DataError, match=r"chats\.jsonl:3 holds list"):
        next(records)
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:1 is not a JSON object"):
        next(read_records(path))
    for name in ("chats.txt", "chats.parquet"):
        (tmp_path / name).write_text("x")
        with pytest.raises(DataError, match="is no JSON Lines"):
            next(read_records(tmp_path / name))
