import json
import logging
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.data.chat_dataset import ChatDataset, ChatOptions, fill_rows
from core.data.tokenizers import ByteTokenizer
from core.errors import DataError

TOKENIZER = ByteTokenizer()


def _write(path: Path, lengths: list[int]) -> Path:
    """Chat c is a prompt of c and a completion, `lengths[c]` tokens with the end."""
    lines = [
        json.dumps({"prompt": chr(65 + c), "completion": chr(97 + c) * (length - 2)})
        for c, length in enumerate(lengths)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def _open(
    path: Path, num_samples: int = 1, tokenizer: ByteTokenizer = TOKENIZER, **changes: Any
) -> ChatDataset:
    options = {
        "seq_length": 16,
        "seed": 5,
        "vocab_size": 257,
        "packing": True,
        "drop_long": False,
        **changes,
    }
    return ChatDataset([path], tokenizer, num_samples, "--data.sft", ChatOptions(**options))


LENGTHS = [5, 9, 17, 3, 8, 4, 12, 6, 7, 3, 3]


def _chats(dataset: ChatDataset, rows: int) -> list[list[int]]:
    """The chats of each row, in order; every sample is checked on the way."""
    found = []
    for sample in (dataset[i] for i in range(rows)):
        members = []
        bounds = sample["cu_seqlens"].tolist()
        assert bounds[0] == 0
        assert bounds[-1] == 16
        for first, end in pairwise(bounds):
            at = slice(first, end)
            tokens, labels = sample["tokens"][at], sample["labels"][at]
            if not sample["loss_mask"][at].any():
                assert end == 16
                assert not tokens.any()
                continue
            chat = int(tokens[0]) - 65
            answer = [97 + chat] * (LENGTHS[chat] - 2)
            assert tokens.tolist() == [65 + chat, *answer]
            assert labels.tolist() == [*answer, 256]
            assert sample["loss_mask"][at].all()
            members.append(chat)
        found.append(members)
    return found


def test_rows_hold_whole_chats(tmp_path: Path) -> None:
    dataset = _open(_write(tmp_path / "c.jsonl", LENGTHS))
    rows = _chats(dataset, len(dataset))
    assert sorted(chat for row in rows for chat in row) == list(range(11))
    assert len(rows) == 5  # 66 tokens in rows of 16
    assert dataset[0]["tokens"].dtype == np.int64
    assert dataset[0]["cu_seqlens"].dtype == np.int32


def test_the_order_follows_from_the_seed_and_changes_by_epoch(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.jsonl", LENGTHS)
    dataset = _open(path, 13)
    per_epoch = len(_open(path))
    assert len(dataset) == 3 * per_epoch
    rows = _chats(dataset, len(dataset))
    epochs = [rows[i : i + per_epoch] for i in range(0, len(rows), per_epoch)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = pickle.loads(pickle.dumps(_open(path, 13)))
    assert _chats(again, len(again)) == rows
    assert _chats(_open(path), per_epoch) == epochs[0]  # a longer run begins as a shorter one
    other = _open(path, seed=6)
    assert _chats(other, len(other)) != epochs[0]


def test_without_packing_a_chat_is_a_sample(tmp_path: Path) -> None:
    dataset = _open(_write(tmp_path / "c.jsonl", LENGTHS), packing=False)
    assert len(dataset) == 11
    assert sorted(int(dataset[i]["tokens"][0]) - 65 for i in range(11)) == list(range(11))
    for sample in (dataset[i] for i in range(11)):
        chat = int(sample["tokens"][0]) - 65
        assert sample.keys() == {"tokens", "labels", "loss_mask"}
        assert int(sample["loss_mask"].sum()) == LENGTHS[chat] - 1


class Counting(ByteTokenizer):
    """Notes how many texts it is asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return super().encode(text)


def test_chats_are_rendered_once_for_all_processes_and_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokenizer = _write(tmp_path / "c.jsonl", LENGTHS), Counting()

    def rendered(**options: Any) -> int:
        before = tokenizer.calls
        _open(path, tokenizer=tokenizer, **options)
        return tokenizer.calls - before

    every = 2 * len(LENGTHS)  # prompt and completion
    assert rendered() == every
    assert rendered() == rendered(seed=3) == rendered(seq_length=20, packing=False) == 0
    assert (tmp_path / "cache" / "ChatDataset_indices").is_dir()
    assert rendered(cache_dir=str(tmp_path / "other")) == every
    tokenizer.fingerprint = "changed"
    assert rendered() == every
    changed = path.read_text().replace("a", "b")
    path.write_text(changed)
    assert rendered() == every
    for file in (tmp_path / "cache").rglob("*-tokens.npy"):
        file.write_bytes(file.read_bytes()[:-4])
    assert rendered() == every
    assert rendered() == 0
    # Another version of the code does not take what an older one kept.
    monkeypatch.setattr("core.data.chat_dataset.inspect.getsource", lambda module: "")
    assert rendered() == every


def test_what_a_loader_process_is_sent(tmp_path: Path) -> None:
    """Not the chats, which it maps itself."""
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b" * 100_000}) + "\n")
    dataset = _open(path, seq_length=100_001)
    sent = pickle.dumps(dataset)
    assert len(sent) < 10_000
    assert np.array_equal(pickle.loads(sent)[0]["labels"], dataset[0]["labels"])


def test_what_the_order_follows_from(tmp_path: Path) -> None:
    path = _write(tmp_path / "c.jsonl", LENGTHS)
    order = _open(path).order
    assert _open(path, 100).order == order
    json.dumps(order)
    assert _open(_write(tmp_path / "d.jsonl", LENGTHS)).order == order
    assert _open(path, packing=False).order != order
    assert _open(path, seq_length=20).order != order
    changed = path.read_text().replace("a", "b")
    path.write_text(changed)
    assert _open(path).order != order


def test_a_chat_that_would_be_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(tmp_path / "c.jsonl", [5, 18, 17])
    message = (
        r"c\.jsonl:2: its 17 tokens do not fit in .*-length 16, .* \(1 of 3 chats are too long, "
        r"and the longest needs 17\)"
    )
    with pytest.raises(DataError, match=message):
        _open(path)
    with caplog.at_level(logging.WARNING):
        dataset = _open(path, drop_long=True, packing=False)
    assert len(dataset) == 2
    assert "--data.sft: 1 of 3 chats are left out" in caplog.text
    with pytest.raises(DataError, match="there is no chat in it"):
        _open(_write(tmp_path / "long.jsonl", [30]), drop_long=True)


def test_a_chat_without_answer(tmp_path: Path) -> None:
    class Silent(ByteTokenizer):
        """Renders a chat without an answer."""

        def chat(self, messages: Any, tools: Any = None) -> Any:
            from core.data.chat import Rendered

            return Rendered(np.array([1, 2], dtype=np.int32), np.array([True, False]))

    path = tmp_path / "c.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    options = ChatOptions(seq_length=8, seed=0, vocab_size=257, packing=True, drop_long=True)
    with pytest.raises(DataError, match=r"c\.jsonl:1: it has no token to be learnt"):
        ChatDataset([path], Silent(), 1, "--data.sft", options)


def test_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    message = r"c\.jsonl:1: it holds token 256, but the vocabulary has 256"
    with pytest.raises(DataError, match=message):
        _open(_write(tmp_path / "c.jsonl", LENGTHS), vocab_size=256)


def test_first_fit() -> None:
    lengths = np.array([6, 5, 4, 5, 9, 1])
    order = np.arange(6)
    assert fill_rows(order, lengths, 10) == [[0, 2], [1, 3], [4, 5]]
    assert fill_rows(order[::-1], lengths, 10) == [[5, 4], [3, 2], [1], [0]]
    rows = fill_rows(np.arange(3000), np.full(3000, 7), 10)
    assert rows == [[i] for i in range(3000)]
