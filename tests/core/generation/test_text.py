import io

import pytest

from core.data.tokenizers import ByteTokenizer
from core.generation.text import Printer, TextStream

TEXT = "aé漢🙂 z"


class Pieces:
    """Joins words as SentencePiece does: the first loses the space before it."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids).removeprefix(" ")


def test_characters_come_whole() -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer)
    given = [stream.add(token) for token in tokenizer.encode(TEXT)]
    assert [text for text in given if text] == list(TEXT)
    assert given[1:3] == ["", "é"]
    assert stream.finish() == ""


def test_a_broken_character_is_marked_at_the_end() -> None:
    stream = TextStream(ByteTokenizer())
    assert stream.add(ord("a")) == "a"
    assert [stream.add(token) for token in "漢".encode()[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_a_broken_character_is_marked_once_text_goes_on() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.add(token) for token in (0xE6, ord("b"), ord("c"))] == ["", "\ufffdb", "c"]


@pytest.mark.parametrize("context", [[], [5, 6]])
def test_spaces_between_pieces_stay(context: list[int]) -> None:
    stream = TextStream(Pieces(), context)
    given = "".join(stream.add(token) for token in (1, 2, 3))
    assert given == (" w1 w2 w3" if context else "w1 w2 w3")


def test_rows_are_written_one_below_the_other() -> None:
    out = io.StringIO()
    tokenizer = ByteTokenizer()
    printer = Printer(out, [TextStream(tokenizer) for _ in range(3)], ["A: ", "B: ", "C: "])
    assert out.getvalue() == "A: "
    printer.add([ord("x"), ord("y"), 256], ends=[256])
    assert out.getvalue() == "A: x"
    printer.add([256, ord("z"), None], ends=[256])
    assert out.getvalue() == "A: x\nB: yz"
    printer.add([None, ord("!"), None])
    printer.finish()
    assert out.getvalue() == "A: x\nB: yz!\nC: \n"
