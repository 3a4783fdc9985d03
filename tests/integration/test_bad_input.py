"""What a careless user types: every mistake costs one sentence and leaves nothing behind.

`Terminal.refused` checks the number of lines, the status and the files; the tests here, the words.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from core.testing.distributed import WorkerError, WorkerPool
from core.testing.terminal import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")

TRAIN = "models/llama/train.py"

RUN = ["--device", "cpu", "--precision.dtype", "fp32", "--data.num-workers", "0"]
RUN += ["--data.seq-length", "16", "--train.global-batch-size", "2", "--train.steps", "2"]
SMALL = ["--model.num-layers", "1", "--model.hidden-size", "24", "--model.vocab-size", "257"]
SMALL += ["--model.num-attention-heads", "4", "--model.num-query-groups", "2"]
SMALL += ["--model.head-dim", "6", "--model.ffn-hidden-size", "16", *RUN]
CORPUS = [*SMALL, "--data.train", "corpus"]

WEIGHT = "model.layers.1.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


# ---- Hugging Face folders ------------------------------------------------------------------------


def held(path: Path) -> dict[str, torch.Tensor]:
    """In memory: the file is about to be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        found = held(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def entries(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.get("weight_map", content).update(changes)
        (folder / name).write_text(json.dumps(content))

    return damage


def config(**changes: Any) -> Damage:
    return entries("config.json", **changes)


def cut(size: int) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def tokenizer_of(size: int) -> Damage:
    def damage(folder: Path) -> None:
        vocabulary = {f"t{i}": i for i in range(size)}
        Tokenizer(WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))

    return damage


def pickled(folder: Path) -> None:
    torch.save(held(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_under_a_false_name(folder: Path) -> None:
    torch.save(held(folder / "model.safetensors"), folder / "model.safetensors")


def duplicated(folder: Path) -> None:
    """A tensor is in two files, and the index names one of them."""
    name = next(iter(load_file(folder / "model-00001-of-00009.safetensors")))
    last = folder / "model-00009-of-00009.safetensors"
    save_file({**held(last), name: torch.ones(1)}, last, metadata={"format": "pt"})


FOLDERS: dict[str, tuple[str, Damage, str]] = {
    "missing": ("hf", tensors(lambda found: found.pop(WEIGHT)), f"missing: {WEIGHT}"),
    "extra": (
        "hf",
        tensors(lambda found: found.update(spare=torch.ones(2))),
        "of the model: spare",
    ),
    "shape": (
        "hf",
        tensors(lambda found: found.update({WEIGHT: torch.ones(47, 40)})),
        rf"{WEIGHT} is \[47, 40\] and must be \[48, 40\]",
    ),
    "whole numbers": (
        "hf",
        tensors(lambda found: found.update({WEIGHT: torch.ones(48, 40, dtype=torch.int8)})),
        f"{WEIGHT} is torch.int8",
    ),
    "two formats": (
        "hf",
        tensors(lambda found: found.update({WEIGHT: found[WEIGHT].half()})),
        f"{WEIGHT} is torch.float16 and .* cast one",
    ),
    "duplicated": ("many", duplicated, "is in two files, model-0000.* and model-0000"),
    "truncated": ("hf", cut(-100), "model.safetensors is damaged"),
    "truncated in the header": ("hf", cut(50), "model.safetensors is damaged"),
    "empty file": ("hf", cut(0), "model.safetensors is damaged"),
    "pickle": ("hf", pickled, "pytorch_model.bin.*convert it to safetensors"),
    "pickle in disguise": ("hf", pickled_under_a_false_name, "not a safetensors file"),
    "index names an absent file": (
        "many",
        entries(INDEX, **{WEIGHT: "gone.safetensors"}),
        "gone.safetensors, which does not exist",
    ),
    "index leaves the folder": (
        "many",
        entries(INDEX, **{WEIGHT: "../hf/model.safetensors"}),
        "not a file of this folder",
    ),
    "index names an absolute path": (
        "many",
        entries(INDEX, **{WEIGHT: "/etc/passwd"}),
        "not a file of this folder",
    ),
    "index is cut": ("many", lambda f: (f / INDEX).write_text("{"), "index.json is not readable"),
    "no config": (
        "hf",
        lambda f: (f / "config.json").unlink(),
        "hf.* config.json|hf/config.json does not exist",
    ),
    "config is cut": ("hf", lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
    "rope_type": (
        "hf",
        config(rope_parameters={"rope_type": "wobble"}),
        "rope_type 'wobble', which is not supported: known types are default",
    ),
    "rope_type of old": (
        "hf",
        config(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_type 'dynamic'",
    ),
    "rope is no table": ("hf", config(rope_parameters=3), "rope_parameters 3, which is no set"),
    "rope is no number": (
        "hf",
        config(rope_parameters={"rope_type": "linear", "factor": "two"}),
        "factor 'two', which is no number",
    ),
    "architecture": ("hf", config(architectures=["LamaForCausalLM"]), "LamaForCausalLM"),
    "no architecture": ("hf", config(architectures=None), "it must name one model class"),
    "layers": ("hf", config(num_hidden_layers=4), "missing: model.layers.3"),
    "no number of layers": ("hf", config(num_hidden_layers="3"), "num_hidden_layers '3', which"),
    "heads": ("hf", config(num_attention_heads=7), "num_attention_heads 7"),
    "kv heads": ("hf", config(num_key_value_heads="two"), "value of another kind"),
    "vocabulary": ("hf", config(vocab_size=66), r"embed_tokens.weight is \[67, 40\] and must"),
    "activation": ("hf", config(hidden_act="mish"), "hidden_act 'mish'"),
    "quantised": ("hf", config(quantization_config={"bits": 4}), "quantised"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_damaged_model_folders(terminal: Terminal, name: str) -> None:
    folder, damage, words = FOLDERS[name]
    damage(Path(folder))
    commands = [
        ("converters", "check", folder),
        ("converters", "import", folder, "out", "--tp", "2"),
        (TRAIN, *SMALL, "--data.synthetic", "--init-from", folder, "--save", "out"),
    ]
    for command in commands:
        sentence = terminal.refused(*command)
        assert re.search(words, sentence), sentence
        assert folder in sentence


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (tokenizer_of(68), "68 tokens and the model a vocabulary of 67"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"junk"), "cannot be read"),
    ],
)
def test_tokenizers_that_do_not_fit(terminal: Terminal, damage: Damage, words: str) -> None:
    damage(Path("hf"))
    for command in (("check", "hf"), ("import", "hf", "out"), ("verify", "hf")):
        assert words in terminal.refused("converters", *command)
    sentence = terminal.refused("converters", "export", "native", "out", "--tokenizer", "hf")
    assert words in sentence
    assert "tokenizer in hf " in sentence


@pytest.mark.parametrize("tp", ["3", "16", "5"])
def test_heads_that_no_layout_divides(terminal: Terminal, tp: str) -> None:
    for command in (["check", "hf"], ["import", "hf", "out"], ["verify", "hf"]):
        sentence = terminal.refused("converters", *command, "--tp", tp)
        assert sentence.startswith(f"hf: num_attention_heads 8 cannot be divided over tp {tp}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("check absent", "absent is not a folder"),
        ("check docs.jsonl", "docs.jsonl is not a folder"),
        ("check Qwen/Qwen3-0.6B", "hf download"),
        ("check hf --tp 0", "--tp is 0"),
        ("check hf --tp two", "--tp: invalid literal"),
        ("verify hf --batch 0", "--batch is 0"),
        ("verify hf --length -1", "--length is -1"),
        ("import hf native", "native exists and is not empty"),
        ("import hf docs.jsonl", "docs.jsonl exists"),
        ("import hf docs.jsonl/x", "docs.jsonl/x could not be written"),
        ("export hf out", "hf holds no checkpoint"),
        ("export absent out", "checkpoint absent is not a directory"),
        ("export native hf", "hf exists and is not empty"),
        ("export native out --tokenizer absent", "--tokenizer absent is not a folder"),
        ("export native out --shard-gb 0", "--shard-gb is 0.0"),
        ("export native out --shard-gb nan", "--shard-gb is nan"),
        ("export native out --dtype bf17", "invalid choice 'bf17' for argument '--dtype'"),
        ("export native out --dtyp bf16", "Unrecognized options: --dtyp, .* you meant --dtype"),
        ("imprt hf out", "import, export, check, verify"),
        ("import hf", "OUT"),
        ("", "import, export, check, verify"),
    ],
)
def test_converters_used_wrongly(terminal: Terminal, argv: str, words: str) -> None:
    sentence = terminal.refused("converters", *argv.split())
    assert re.search(words, sentence), sentence


def test_a_process_of_verify_that_fails(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any, **options: Any) -> None:
        raise WorkerError("rank 1 of 2: Traceback (most recent call last):\n  ...\nMemoryError: 3")

    monkeypatch.setattr(WorkerPool, "run", run)
    sentence = terminal.refused("converters", "verify", "hf", "--tp", "2")
    assert sentence.startswith("hf could not be run on 2 processes (MemoryError: 3): ")


# ---- Checkpoints ---------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


STEP = Path("native/step_00000000")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda: flip(STEP / "rank_00001.safetensors"), "rank_00001.safetensors is damaged"),
        (lambda: os.truncate(STEP / "rank_00001.safetensors", 9), "has 9 bytes"),
        (lambda: (STEP / "rank_00000.safetensors").unlink(), "rank_00000.safetensors is missing"),
        (lambda: flip(STEP / "index.json"), "index.json"),
        (lambda: (STEP / "index.json").write_text("{}"), "not the index"),
        (lambda: (STEP / "index.json").unlink(), "index.json"),
        (lambda: shutil.rmtree(STEP), "native holds no checkpoint"),
    ],
)
def test_damaged_checkpoints(terminal: Terminal, damage: Callable[[], object], words: str) -> None:
    damage()
    same = (STEP.parent / "latest").read_bytes()
    assert words in terminal.refused("core.checkpoint", "inspect", "native", "--verify")
    assert words in terminal.refused("converters", "export", "native", "out")
    options = ["--data.synthetic", "--load", "native", "--save", "out"]
    if words != "rank_00001.safetensors is damaged":  # found by reading it, not at the start
        assert words in terminal.refused(TRAIN, *SMALL, *options)
    assert (STEP.parent / "latest").read_bytes() == same


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("inspect absent", "checkpoint absent is not a directory"),
        ("inspect hf", "hf holds no checkpoint"),
        ("inspect native --verfy", "you meant --verify"),
        ("inspct native", "inspect"),
        ("", "inspect"),
    ],
)
def test_inspect_used_wrongly(terminal: Terminal, argv: str, words: str) -> None:
    assert words in terminal.refused("core.checkpoint", *argv.split())


def test_checkpoints_of_another_architecture(terminal: Terminal) -> None:
    synthetic = [*SMALL, "--data.synthetic"]
    sentence = terminal.refused(TRAIN, *synthetic, "--load", "native", "--save", "out")
    assert re.search(r"another architecture: num_layers is 3 there and 1 here, .* more f", sentence)
    assert terminal.run(TRAIN, *synthetic, "--save", "run")[0] == 0
    for option in ("--load", "--save"):
        sentence = terminal.refused(TRAIN, *synthetic, option, "run", "--model.hidden-size", "48")
        assert (
            "step_00000002 is of another architecture: hidden_size is 24 there and 48" in sentence
        )


def test_weights_of_another_model(terminal: Terminal) -> None:
    options = [*SMALL, "--data.synthetic", "--save", "out", "--init-from"]
    sentence = terminal.refused(TRAIN, *options, "hf")
    assert sentence.startswith("the model and hf differ in num_layers: 1 and 3; ")
    for name in ("absent", "docs.jsonl", "corpus", "org/name"):
        sentence = terminal.refused(TRAIN, *options, name)
        words = f"--init-from {name} is neither a checkpoint nor a folder with a config.json: "
        assert sentence.startswith(words)
    sentence = terminal.refused(TRAIN, *options, "native")
    assert re.search(r"another architecture: num_layers is 3 there and 1 here, ", sentence)


# ---- Options of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--train.step 3", r"Unrecognized options: --train.step, 3; .*--train.steps"),
        ("--trian.steps 3", r"Unrecognized options: --trian.steps, .*--train.steps"),
        ("--presett tiny", "perhaps you meant .*--preset"),
        ("--preset llama3-9b", "--preset llama3-9b is not known: perhaps you meant llama3-8b"),
        ("--train.steps many", "--train.steps: invalid literal"),
        ("--train.steps", "Missing value for argument '--train.steps'"),
        ("--device gpu", "invalid choice 'gpu' for argument '--device'"),
        ("--config absent.toml", "--config absent.toml cannot be read"),
        ("--config docs.jsonl", "docs.jsonl: the name must end in .toml"),
        ("--train.steps -3", "--train.steps is -3"),
        ("--train.steps 0", "--train.steps is 0"),
        ("--train.global-batch-size 0", "global-batch-size is 0"),
        ("--train.micro-batch-size 3", "choose a multiple of 3"),
        ("--train.log-interval 0", "--train.log-interval is 0"),
        ("--train.hang-timeout-seconds nan", "--train.hang-timeout-seconds is nan"),
        ("--train.exit-duration-minutes nan", "--train.exit-duration-minutes is nan"),
        ("--train.exit-at-step 9", "--train.exit-at-step is 9"),
        ("--train.seed -1", "--train.seed is -1"),
        ("--train.save-interval 2", "does nothing without --save"),
        ("--train.eval-interval 1 --data.split 1", "--train.eval-interval 1 has no data"),
        ("--train.track trackio trackio", "name each tracker once"),
        ("--optimizer.lr nan", "--optimizer.lr is nan"),
        ("--optimizer.warmup-steps 10", "warm-up of 10 steps .* raise --train.steps"),
        ("--parallel.tp 3", "--parallel.tp: num_attention_heads 4 cannot be divided over tp 3"),
        ("--parallel.tp 16", "--parallel.tp: num_attention_heads 4 cannot be divided over tp 16"),
        ("--parallel.tp 0", "--parallel.tp is 0"),
        ("--parallel.tp 2", "1 processes cannot be divided by tp"),
        ("--parallel.cp 2", "--parallel.cp is 2, but this axis is not built yet"),
        ("--parallel.pp 2 --parallel.layout EL", "--parallel.layout: layout 'EL' has 1 pieces"),
        ("--parallel.pp 2 --parallel.virtual-stages 2", "1f1b cannot serve 2 chunks per stage"),
        ("--parallel.dp 2", "--parallel.dp is 2"),
        ("--parallel.dp 0", "--parallel.dp is 0"),
        ("--parallel.bucket-mib 0", "--parallel.bucket-mib is 0"),
        ("--parallel.sequence-parallel", "does nothing with --parallel.tp 1"),
        ("--model.num-attention-heads 3", "--model: num_attention_heads 3"),
        ("--model.num-query-groups 0", "--model: num_query_groups is 0"),
        ("--model.head-dim 0", "--model: head_dim is 0"),
        ("--model.hidden-dropout nan", "--model: hidden_dropout is nan"),
        ("--model.norm-epsilon -1", "--model: norm_epsilon is -1"),
        ("--model.rope.theta 0", "--model: rope.theta is 0"),
        ("--model.rope.type yarn", "--model: rope.type yarn needs"),
        ("--data.seq-length 0", "--data.seq-length is 0"),
        ("--data.seq-length 5000", "--data.seq-length 5000 is above --model.max-position"),
        ("--data.split 1,2,x", "--data.split is '1,2,x'"),
        ("--data.split 0,1", "leaves it no documents: give it a weight$"),
        ("--data.train 3 corpus 4", "give every corpus a weight"),
        ("--data.synthetic", "--data.train names one"),
        ("--save docs.jsonl", "--save docs.jsonl: .* is a file"),
        ("--save docs.jsonl/below", "--save docs.jsonl/below: .*docs.jsonl is a file"),
        ("--load absent", "checkpoint absent is not a directory"),
        ("--load hf", "hf holds no checkpoint"),
        ("--tokenizer absent.json", "--tokenizer absent.json does not exist"),
        ("--tokenizer hf", "--tokenizer hf has neither tokenizer.json"),
    ],
)
def test_runs_that_cannot_work(terminal: Terminal, argv: str, words: str) -> None:
    save = [] if "--save" in argv or "save-interval" in argv else ["--save", "out"]
    sentence = terminal.refused(TRAIN, *CORPUS, *save, *argv.split())
    assert re.search(words, sentence), sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(terminal: Terminal) -> None:
    assert "has no GPU" in terminal.refused(TRAIN, *CORPUS, "--device", "cuda", "--save", "out")


def test_dropout_in_a_window_is_refused_before_a_gpu_is_looked_for(terminal: Terminal) -> None:
    options = ["--model.sliding-window", "8", "--model.attention-dropout", "0.1"]
    sentence = terminal.refused(TRAIN, *CORPUS, *options, "--device", "cuda")
    assert "--model: attention_dropout 0.1 with a sliding_window of 8" in sentence
    assert terminal.run(TRAIN, *CORPUS, *options)[0] == 0


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.toml",
            "[train]\nstep = 3",
            "a.toml: Unrecognized options: --train.step=3; .*--train.s",
        ),
        ("a.toml", "[trian]\nsteps = 3", "a.toml: Unrecognized .*--train.steps"),
        ("a.yaml", "train:\n  step: 3", "a.yaml: Unrecognized .*--train.steps"),
        ("a.toml", "[train]\nsteps = 'x'", "a.toml: --train.steps: invalid literal"),
        ("a.toml", "preset = 'tny'", "--preset tny is not known: perhaps you meant tiny"),
        ("a.toml", "[train", "a.toml is not valid TOML"),
    ],
)
def test_files_of_options(terminal: Terminal, name: str, text: str, words: str) -> None:
    Path(name).write_text(text)
    sentence = terminal.refused(TRAIN, *CORPUS, "--save", "out", "--config", name)
    assert re.search(words, sentence), sentence


# ---- Data ----------------------------------------------------------------------------------------


def replaced(start: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda index: index[:start] + data + index[start + len(data) :]


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("idx", lambda index: b"", "corpus.idx .* 0 bytes long"),
        ("idx", lambda index: index[:9], "corpus.idx .* 9 bytes long"),
        ("idx", replaced(0, b"junk"), "corpus.idx is not the index"),
        ("idx", lambda index: index[:-9], "corpus.idx is corrupt"),
        ("idx", replaced(9, b"\2"), "corpus.idx has version 2"),
        ("idx", replaced(17, b"\x77"), "corpus.idx has dtype code 119"),
        ("idx", replaced(18, b"\0" * 8), "corpus.idx is empty"),
        ("idx", replaced(18, b"\xff" * 16), "corpus.idx is corrupt"),
        ("idx", replaced(34, b"\xff" * 4), "corpus.idx is corrupt"),
        ("idx", replaced(34, b"\xff\0\0\0"), "corpus.idx is corrupt"),
        ("bin", lambda tokens: tokens[:-7], "corpus.bin has .* truncated"),
        ("bin", lambda tokens: b"", "corpus.bin has 0 bytes"),
    ],
)
def test_damaged_corpora(
    terminal: Terminal, file: str, damage: Callable[[bytes], bytes], words: str
) -> None:
    path = Path(f"corpus.{file}")
    path.write_bytes(damage(path.read_bytes()))
    sentence = terminal.refused(TRAIN, *CORPUS, "--save", "out")
    assert re.search(words, sentence), sentence


def test_corpora_that_are_not_there(terminal: Terminal) -> None:
    shutil.copy("corpus.idx", "alone.idx")
    for argv, words in (
        (["--data.train", "absent"], "cannot read absent.idx"),
        (["--data.train", "corpus.bin"], "without .bin or .idx"),
        (["--data.train", "alone"], "alone.bin is missing, but alone.idx describes it"),
        (["--data.synthetic", "--tokenizer", "byte", "--model.vocab-size", "99"], "has 257 tokens"),
        ([], "no training data: name a corpus with --data.train"),
    ):
        assert words in terminal.refused(TRAIN, *SMALL, "--save", "out", *argv)


def test_tokens_above_the_vocabulary(terminal: Terminal) -> None:
    """Found when they are read, by a loader process as well; what was saved before stays."""
    for workers in ("0", "1"):
        options = ["--model.vocab-size", "100", "--data.num-workers", workers]
        sentence = terminal.refused(TRAIN, *CORPUS, *options)
        assert re.match("corpus.bin holds token 1.*, but the vocabulary has 100: tok", sentence)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--input absent.jsonl", "--input absent.jsonl does not exist"),
        ("--input hf", "--input hf is a folder"),
        ("--json-key body", "docs.jsonl:1 has no text under 'body'"),
        ("--tokenizer absent.model", "--tokenizer absent.model does not exist"),
        ("--tokenizer docs.jsonl", "--tokenizer docs.jsonl cannot be loaded"),
        ("--output corpus", "corpus.bin exists"),
        ("--output docs.jsonl/x", "--output docs.jsonl/x cannot be written"),
        ("--workers -2", "--workers is -2"),
        ("--ouput x", "Unrecognized options: --ouput, x; perhaps you meant --output"),
        ("--workers two", "--workers: invalid literal"),
    ],
)
def test_preprocess_used_wrongly(terminal: Terminal, argv: str, words: str) -> None:
    given = ["--input", "docs.jsonl", "--output", "out", "--tokenizer", "byte", "--workers", "0"]
    assert words in terminal.refused("core.data.preprocess", *given, *argv.split())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text":\n', "x.jsonl:2 is not a JSON object"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl:1 holds '\\ud800' under 'text', half of a"),
        ("x.jsonl", b"", "no document has text"),
        ("x.txt", b"\xff\xfe\0", "x.txt is not UTF-8 text"),
        ("x.parquet", b"no", "cannot read x.parquet"),
        ("x.jsonl.gz", b"no", "cannot read x.jsonl.gz"),
    ],
)
def test_text_that_cannot_be_read(
    terminal: Terminal, name: str, content: bytes, words: str
) -> None:
    Path(name).write_bytes(content)
    options = ["--output", "out", "--tokenizer", "byte", "--workers", "0"]
    assert words in terminal.refused("core.data.preprocess", "--input", name, *options)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--output absent/tok.model", "absent/tok.model cannot be written (No such file or dir"),
        ("--output docs.jsonl/tok.model", "docs.jsonl/tok.model cannot be written (Not a dir"),
        ("--output tok.json", "--output tok.json must end in .model"),
        ("--output tok.model --vocab-size 9000", "no vocabulary of 9000 can be trained"),
        ("--output tok.model --vocab-siz 300", "perhaps you meant --vocab-size"),
    ],
)
def test_tokenizers_that_cannot_be_trained(terminal: Terminal, argv: str, words: str) -> None:
    options = ["--input", "docs.jsonl", "--vocab-size", "290"]
    assert words in terminal.refused("core.data.train_tokenizer", *options, *argv.split())
