"""Generation against `transformers`, at several tp, from Hugging Face folders and checkpoints."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from converters.native import import_checkpoint
from core.config.generation import GenerationConfig
from core.config.parallel import ParallelConfig
from core.data.tokenizers import load_tokenizer
from core.errors import DamagedCheckpointError
from core.generation.loop import GenerativeModel, generate
from core.parallel.context import ParallelContext
from core.testing.chat_tokenizers import save_chat_tokenizer
from core.testing.distributed import WorkerPool
from core.testing.hf_models import VARIANTS, save_hf_model, tiny_hf_model
from models.generate import build_model, end_tokens, main, open_model

PROMPTS = [[5, 9, 30], [60, 3, 7, 11, 2, 40, 41, 42, 43], [8], [1, 33, 20, 21, 22]]
GREEDY = GenerationConfig(max_tokens=12)
DRAWN = GenerationConfig(max_tokens=12, temperature=1.3, top_k=40, top_p=0.95, seed=3)
CPU = torch.device("cpu")


def _generate(
    folder: Path, config: GenerationConfig, ctx: ParallelContext, prompts: list[list[int]] = PROMPTS
) -> list[list[int]]:
    model = build_model(open_model(folder), ctx, torch.float32)
    assert isinstance(model, GenerativeModel)
    steps = list(generate(model, prompts, config, tp=ctx.tp, device=ctx.device))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def _on_rank(
    folders: list[Path], configs: list[GenerationConfig], tp: int
) -> list[list[list[int]]]:
    ctx = ParallelContext.create(ParallelConfig(tp=tp), CPU)
    return [_generate(folder, config, ctx) for folder in folders for config in configs]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {variant: save_hf_model(root / variant, variant) for variant in VARIANTS}


def _transformers(variant: str) -> list[list[int]]:
    """One prompt at a time, so that nothing is padded."""
    model = tiny_hf_model(variant)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=GREEDY.max_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_greedy_tokens_are_those_of_transformers(pool: WorkerPool, saved: dict[str, Path]) -> None:
    expected = [_transformers(variant) for variant in saved]
    assert all(len(row) == 12 for model in expected for row in model)
    assert len({tuple(row) for model in expected for row in model}) > 20
    folders = list(saved.values())
    for found in pool.run(_on_rank, 2, folders, [GREEDY], 2):
        assert dict(zip(saved, found, strict=True)) == dict(zip(saved, expected, strict=True))
    single = [_generate(folder, GREEDY, ParallelContext.single()) for folder in folders]
    assert single == expected


def test_draws_are_the_same_at_every_tp(pool: WorkerPool, saved: dict[str, Path]) -> None:
    folders = [saved["mistral"], saved["qwen3"]]
    expected = [_generate(folder, DRAWN, ParallelContext.single()) for folder in folders]
    assert expected[0] != _generate(folders[0], GREEDY, ParallelContext.single())
    for found in pool.run(_on_rank, 2, folders, [DRAWN], 2):
        assert found == expected


def test_a_checkpoint_gives_what_its_source_gives(tmp_path: Path, saved: dict[str, Path]) -> None:
    """Whatever else is in the batch, and however the checkpoint is cut."""
    ctx = ParallelContext.single()
    import_checkpoint(saved["llama3"], tmp_path / "native", tp=2)
    found = _generate(tmp_path / "native", GREEDY, ctx)
    assert found == _generate(saved["llama3"], GREEDY, ctx)
    assert found[1:2] == _generate(saved["llama3"], GREEDY, ctx, PROMPTS[1:2])


def test_a_checkpoint_with_a_damaged_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    step = import_checkpoint(folder, tmp_path, tp=1)
    tokenizer = step / "hf" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"w5", b"w6"))
    with pytest.raises(DamagedCheckpointError, match=r"hf/tokenizer.json is damaged"):
        open_model(tmp_path)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of words, and an end that only generation_config.json names."""
    path = save_hf_model(tmp_path_factory.mktemp("cli") / "model", "llama")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 67)}}
    raw = RawTokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(path)
    return path


def _words(prompt: list[int]) -> str:
    return " ".join(f"w{i}" for i in prompt)


def test_the_command_prints_prompt_and_answer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--model", str(folder), "--prompt", "w5 w9 w30", "w8", "--max-tokens", "6"])
    config = GenerationConfig(max_tokens=6)
    rows = _generate(folder, config, ParallelContext.single(), [PROMPTS[0], PROMPTS[2]])
    assert not any(token < 3 for row in rows for token in row)
    printed = capsys.readouterr()
    assert printed.out.split("\n") == [
        f"w5 w9 w30 {_words(rows[0])}",
        f"w8 {_words(rows[1])}",
        "",
    ]
    assert printed.err.startswith("12 tokens in ")
    assert "tokens/s" in printed.err


def test_the_command_starts_its_own_processes(folder: Path) -> None:
    argv = ["--model", str(folder), "--parallel.tp", "2", "--prompt", "w5 w9 w30"]
    command = [sys.executable, "-m", "models.generate", *argv, "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    config = GenerationConfig(max_tokens=4)
    rows = _generate(folder, config, ParallelContext.single(), PROMPTS[:1])
    assert done.stdout == f"w5 w9 w30 {_words(rows[0])}\n"


def test_ends_of_tokenizer_and_generation_config(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    opened, tokenizer = open_model(own), load_tokenizer(str(own))
    (own / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(opened, tokenizer) == {2, 7, 9}
    (own / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert end_tokens(opened, tokenizer) == {2, 7}
    (own / "generation_config.json").unlink()
    assert end_tokens(opened, tokenizer) == {2}
    # As transformers does, from config.json alone if there is nothing else.
    named = dataclasses.replace(opened, hf_config={"eos_token_id": [5, 6]})
    assert end_tokens(named, tokenizer) == {2, 5, 6}


def test_a_chat_ends_as_its_template_says(folder: Path, tmp_path: Path) -> None:
    chat = load_tokenizer(str(save_chat_tokenizer(tmp_path, eos_token="<|im_start|>")))
    start, end = (chat.encode(text)[0] for text in ("<|im_start|>", "<|im_end|>"))
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "generation_config.json").unlink()
    opened = dataclasses.replace(open_model(own), hf_config={})
    assert end_tokens(opened, chat) == {start}
    assert end_tokens(opened, chat, chat=True) == {start, end}


def test_processes_of_torchrun_must_be_as_many_as_tp(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["--model", str(folder), "--prompt", "w3"])
    assert "--parallel.tp is 1, and torchrun started 2 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nowhere"], "--model nowhere is no folder"),
        (["--model", "{empty}"], "holds no checkpoint"),
        (["--max-tokens", "127"], "prompt 1 has 2 tokens, and 127 more"),
        (["--top-k", "3"], "--top-k 3 does nothing"),
        (["--parallel.tp", "0"], "--parallel.tp is 0"),
        (["--parallel.tp", "3"], "num_attention_heads 8 cannot be divided over tp 3"),
        (["--tokenizer", "byte"], "gives token 119, but the model has a vocabulary of 67"),
        (["--prompt", ""], "prompt 1 has no token"),
        (["--prompt-file", "x"], "--prompt-file"),
    ],
)
def test_refusals(
    folder: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--model": str(folder), "--prompt": "w3 w4", "--max-tokens": "4"}
    options |= dict(zip(argv[::2], argv[1::2], strict=True))
    args = [part.replace("{empty}", str(tmp_path)) for pair in options.items() for part in pair]
    with pytest.raises(SystemExit) as left:
        main(args)
    assert left.value.code in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
