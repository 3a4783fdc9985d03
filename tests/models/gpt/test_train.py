"""The command line: a small model is trained, exported, and computes the same in transformers."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import core.training.process
from converters.native import export_checkpoint
from converters.verify import verify
from core.training.entrypoint import main
from models.gpt.train import CHOICE, gpt_task

SMALL = [
    *("--model.num-layers", "2", "--model.hidden-size", "64", "--model.ffn-hidden-size", "80"),
    *("--model.num-attention-heads", "4", "--model.vocab-size", "67"),
    *("--model.max-position-embeddings", "32", "--device", "cpu", "--precision.dtype", "fp32"),
    *("--data.synthetic", "--data.num-workers", "0", "--train.global-batch-size", "4"),
    *("--train.steps", "2", "--optimizer.lr", "0.01"),
]


@pytest.fixture(autouse=True)
def _one_process_of_many(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A training process leaves without Python's shutdown, and would take the tests with it."""

    def leave(status: int = 1) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(core.training.process, "exit_now", leave)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize(
    ("preset", "architecture"),
    [
        ("gpt-tiny", "GPT2LMHeadModel"),
        ("gpt3-1.3b", "GPT2LMHeadModel"),
        ("gpt-neox-20b", "GPTNeoXForCausalLM"),
    ],
)
def test_a_trained_model_is_what_transformers_opens(
    tmp_path: Path, preset: str, architecture: str
) -> None:
    options = ["--preset", preset, *SMALL, "--data.seq-length", "32", "--save", str(tmp_path / "s")]
    main(CHOICE, gpt_task, prog="models/gpt/train.py", argv=options)
    report = verify(export_checkpoint(tmp_path / "s", tmp_path / "hf"), length=32)
    assert report.passed
    assert report.architecture == architecture
    assert report.largest_logit > 0.01


def test_a_sequence_longer_than_the_positions_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "gpt-tiny", *SMALL, "--data.seq-length", "33"]
    with pytest.raises(SystemExit) as left:
        main(CHOICE, gpt_task, prog="models/gpt/train.py", argv=options)
    assert left.value.code == 2
    assert "--data.seq-length 33 is above --model.max-position-embeddings 32" in (
        capfd.readouterr().err
    )
