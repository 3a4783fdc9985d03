import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from core.data.tokenizers import ByteTokenizer, load_tokenizer, train_sentencepiece
from core.errors import DataError

TEXT = "The quick brown fox jumps over the lazy dog.\n  Indented: naïve 漢字 12345 🙂\n"


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([TEXT] * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", model_max_length=8
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sp") / "tiny.model"
    train_sentencepiece([TEXT] * 50, path, vocab_size=330)
    assert [file.name for file in path.parent.iterdir()] == ["tiny.model"]
    return path


def test_bytes() -> None:
    tokenizer = load_tokenizer("byte")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.encode_batch(["a", ""]) == [[97], []]
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod]) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.name) == (257, 256, "byte")


def test_hugging_face(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(str(hf_folder))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < tokenizer.vocab_size == 300
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.eod) == (0, 1, None, 1)
    assert not {0, 1} & set(ids)  # no special token is added
    assert tokenizer.encode_batch([TEXT, ""]) == [ids, []]
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize(
    ("template", "before"), [("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", [])]
)
def test_special_tokens_before_a_prompt(
    hf_folder: Path, tmp_path: Path, template: str, before: list[int]
) -> None:
    """Those that come before a text, an empty one too, and none that end it."""
    raw = RawTokenizer.from_file(str(hf_folder / "tokenizer.json"))
    special = [("<s>", 0), ("</s>", 1)]
    raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    for text in (TEXT, " a", ""):
        assert tokenizer.encode_prompt(text) == [*before, *tokenizer.encode(text)]


def test_tokenizer_json_takes_its_special_tokens_from_beside_it(
    hf_folder: Path, tmp_path: Path
) -> None:
    whole = load_tokenizer(str(hf_folder / "tokenizer.json"))
    assert whole.eod == 1
    alone = tmp_path / "tokenizer.json"
    alone.write_bytes((hf_folder / "tokenizer.json").read_bytes())
    bare = load_tokenizer(str(alone))
    assert bare.encode(TEXT) == whole.encode(TEXT)
    with pytest.raises(DataError, match=r"tokenizer\.json has no end-of-document token"):
        bare.eod  # noqa: B018


def test_sentencepiece(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_model))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.vocab_size == 330
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.eod) == (1, 2, None, 2)
    assert max(ids) < 330
    assert tokenizer.decode([*ids, 330, 400]) == TEXT  # rows of a model without a piece
    assert tokenizer.encode_batch([TEXT, ""]) == [ids, []]
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    assert load_tokenizer(str(folder)).encode(TEXT) == ids


def test_fingerprints(hf_folder: Path, sentencepiece_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(hf_folder, tmp_path / "copy")
    found = load_tokenizer(str(copy)).fingerprint
    assert found == load_tokenizer(str(hf_folder)).fingerprint
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    pieces = tmp_path / "other.model"
    train_sentencepiece([TEXT] * 50, pieces, vocab_size=320)
    others = [str(copy), str(sentencepiece_model), str(pieces), "byte"]
    assert len({found, *(load_tokenizer(other).fingerprint for other in others)}) == 5


def test_unigram(tmp_path: Path) -> None:
    text = Path(__file__).read_text()
    train_sentencepiece([text], tmp_path / "u.model", vocab_size=400, model_type="unigram")
    tokenizer = load_tokenizer(str(tmp_path / "u.model"))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_a_vocabulary_that_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no vocabulary of 9000 can be trained: Vocabulary size too high"
    ):
        train_sentencepiece(["abc"], tmp_path / "x.model", vocab_size=9000, model_type="unigram")
    assert not list(tmp_path.iterdir())


def test_long_lines_are_learnt_from(tmp_path: Path) -> None:
    """SentencePiece drops lines of more than 4192 bytes if it is not told otherwise."""
    train_sentencepiece(["дом кот " * 2000, TEXT], tmp_path / "l.model", vocab_size=330)
    tokenizer = load_tokenizer(str(tmp_path / "l.model"))
    assert len(tokenizer.encode("дом кот")) <= 4


def test_no_text_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no text to train a tokenizer on"):
        train_sentencepiece(["\n", ""], tmp_path / "x.model", vocab_size=300)


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent/nowhere/tok does not exist: give `byte`"):
        load_tokenizer("absent/nowhere/tok")
    for name in ("absent.model", "absent/tokenizer.json"):
        with pytest.raises(DataError, match=f"{name} does not exist"):
            load_tokenizer(name)
    (tmp_path / "bad.model").write_text("no model")
    with pytest.raises(DataError, match=r"bad\.model is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "bad.model"))
    with pytest.raises(DataError, match="has neither tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match="cannot be loaded"):
            load_tokenizer(str(spec))
