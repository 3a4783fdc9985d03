import re

import pytest

from core.config.data import Blend, DataConfig, parse_blend, parse_split, validate_data
from core.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(), "no training data: name a corpus with --data.train"),
        (DataConfig(synthetic=True, train=("a",)), "--data.train names one"),
        (DataConfig(synthetic=True, reset_attention_mask=True), "--data.reset-attention-mask does"),
        (DataConfig(sft=("a",), train=("b",)), "--data.sft trains on chats, and --data.train on"),
        (DataConfig(sft=("a",), synthetic=True), "and --data.synthetic on something else"),
        (
            DataConfig(sft=("a",), mask_eod_loss=True),
            "--data.mask-eod-loss does nothing with --data",
        ),
        (DataConfig(sft=("a",), reset_attention_mask=True), "--data.reset-attention-mask does"),
        (DataConfig(sft=("a",), split="9,1"), "--data.split 9,1 does nothing"),
        (DataConfig(train=("a",), sft_valid=("b",)), "--data.sft-valid does nothing without"),
        (DataConfig(train=("a",), sft_packing=False), "--data.no-sft-packing does nothing without"),
        (DataConfig(train=("a",), sft_drop_long=True), "--data.sft-drop-long does nothing without"),
        (DataConfig(train=("a",), seq_length=0), "--data.seq-length is 0"),
        (DataConfig(train=("a",), num_workers=-1), "--data.num-workers is -1"),
        (DataConfig(train=("a",), prefetch=0), "--data.prefetch is 0"),
        (DataConfig(train=("a",), split="1,x"), "--data.split is '1,x'"),
        (DataConfig(train=("a",), split="1,2,3,4"), "--data.split is"),
        (DataConfig(train=("a",), split="1,-2"), "--data.split is"),
        (DataConfig(train=("a",), split="0,0"), "--data.split is"),
        (DataConfig(train=("a",), split="nan"), "--data.split is"),
        (DataConfig(train=("a",), valid=("b",), split="9,1"), "--data.split 9,1 does nothing"),
        (DataConfig(train=("3", "a", "b")), "--data.train 3 a b: give every corpus a weight"),
        (DataConfig(train=("3", "a", "b", "c")), "give every corpus a weight"),
        (DataConfig(train=("a", "3")), "give every corpus a weight"),
        (DataConfig(train=("a",), test=("0", "a", "1", "b")), "--data.test 0 a 1 b: every weight"),
    ],
)
def test_bad_options_are_named(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_data(config)


def test_good_options_pass() -> None:
    validate_data(DataConfig(train=("a",)))
    validate_data(DataConfig(synthetic=True))
    validate_data(DataConfig(sft=("a", "b"), sft_valid=("c",), sft_drop_long=True))
    validate_data(DataConfig(train=("30", "a", "70", "b"), valid=("c", "d")))


def test_blends_are_parsed() -> None:
    assert parse_blend(("30", "a", "70", "b"), "") == Blend(("a", "b"), (30.0, 70.0))
    assert parse_blend(("a", "b"), "") == Blend(("a", "b"), None)
    assert parse_split("98, 2") == (98.0, 2.0, 0.0)


def test_whether_documents_are_separate() -> None:
    assert not DataConfig(train=("a",)).separate_documents
    assert DataConfig(train=("a",), reset_attention_mask=True).separate_documents
    assert DataConfig(sft=("a",)).separate_documents
    assert not DataConfig(sft=("a",), sft_packing=False).separate_documents
