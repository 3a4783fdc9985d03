from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from core.data.__main__ import describe, main
from core.data.indexed_dataset import IndexedDatasetWriter
from core.data.tokenizers import ByteTokenizer
from core.testing.chat_tokenizers import save_chat_tokenizer

CHAT = (
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo 🙂"}]}\n'
)


def test_a_packed_sample_of_chats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = save_chat_tokenizer(tmp_path / "tok")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(CHAT + '{"prompt": "one", "completion": " two"}\n')
    options = ["--data.sft", str(chats), "--data.seq-length", "60"]
    main(["show", "--tokenizer", str(tokenizer), *options])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sample 0 of 1 of the train set: 60 tokens, 13 of them learnt, in 3")
    text = "\n".join(lines)
    answer = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo 🙂<|im_end|>⟧"
    assert answer in text
    assert "one⟦ two<|im_end|>⟧" in text
    assert "that nothing is learnt from" in lines[-1]


class Pieces(ByteTokenizer):
    """Joins words as SentencePiece does: the first loses the space before it."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" w{i}" for i in ids).removeprefix(" ")


def test_spaces_before_what_is_learnt_are_seen() -> None:
    sample = {
        "tokens": np.array([1, 2, 3, 4]),
        "labels": np.array([2, 3, 4, 5]),
        "loss_mask": np.array([False, True, False, True]),
    }
    assert list(describe(sample, Pieces()))[-1] == "w1 w2⟦ w3⟧ w4⟦ w5⟧"


def test_a_sample_of_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        for text in ("abc", "defg"):
            writer.add_document([*text.encode(), 256])
        writer.finish()
    options = ["--data.train", str(tmp_path / "c"), "--data.split", "1", "--data.seq-length", "8"]
    main(["show", "--tokenizer", "byte", *options])
    plain = capsys.readouterr().out.splitlines()
    assert plain[0] == "sample 0 of 1 of the train set: 8 tokens, 8 of them learnt, in 1 document"
    assert plain[1] == "--- document 1: 9 tokens, 8 of them learnt"
    assert plain[2] in ("a⟦bc<256>defg<256>⟧", "d⟦efg<256>abc<256>⟧")
    main(["show", "--tokenizer", "byte", *options, "--data.reset-attention-mask"])
    apart = capsys.readouterr().out
    assert "in 2 documents" in apart
    assert "a⟦bc<256>⟧" in apart
    assert "d⟦efg<256>⟧" in apart


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "--tokenizer", "byte", "--data.sft", str(tmp_path / "none.jsonl")])
    assert "--data.sft" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["show", "--tokenizer", "byte", "--data.synthetic", "--index", "-1"])
    assert "--index is -1" in capsys.readouterr().err
