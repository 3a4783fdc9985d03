import json
import math
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from converters.hf_io import OutputTensor, write_weights
from converters.native import (
    check_source,
    config_from_json,
    describe,
    export_checkpoint,
    import_checkpoint,
)
from converters.options import ExportOptions
from converters.plan import make_plan
from core.checkpoint.index import SavedTensor, model_key
from core.checkpoint.reader import open_checkpoint
from core.checkpoint.writer import write_checkpoint
from core.config.transformer import RopeConfig, TransformerConfig
from core.data.tokenizers import train_sentencepiece
from core.errors import CheckpointError, ConfigError, ConversionError
from core.parallel.sharding import Box, BoxCopy
from core.testing.disk import disk_with_room_for
from core.testing.hf_models import VARIANTS, save_hf_model
from models.llama.convert import FAMILY, to_hf


def content(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read without any of the code under test."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def assert_same_bits(a: Path, b: Path) -> None:
    left, right = content(a), content(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value.view(torch.uint8), right[name].view(torch.uint8)), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_is_bit_exact_at_every_tp(tmp_path: Path, variant: str) -> None:
    # Every other variant in bf16 and in one file.
    odd = list(VARIANTS).index(variant) % 2 == 1
    dtype = torch.bfloat16 if odd else torch.float32
    source = save_hf_model(
        tmp_path / "hf", variant, dtype=dtype, shard_size="1GB" if odd else "20KB"
    )
    assert (len(list(source.glob("*.safetensors"))) == 1) == odd
    for tp in (1, 2, 4, 8):
        step = import_checkpoint(source, tmp_path / f"native{tp}", tp)
        files = open_checkpoint(step).index.files
        assert sum(name.startswith("rank_") for name in files) == tp
        assert "hf/generation_config.json" in files
        out = export_checkpoint(tmp_path / f"native{tp}", tmp_path / f"back{tp}")
        assert_same_bits(source, out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_opens_the_export_without_remark(tmp_path: Path, variant: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = save_hf_model(tmp_path / "hf", variant)
    import_checkpoint(source, tmp_path / "native", 4)
    out = export_checkpoint(tmp_path / "native", tmp_path / "back", ExportOptions(shard_gb=2e-5))
    assert len(list(out.glob("*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == VARIANTS[variant][0]
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (source, out))
    assert before == {**after, "_name_or_path": before["_name_or_path"]}


def test_a_checkpoint_stores_each_kv_head_once(tmp_path: Path) -> None:
    step = import_checkpoint(save_hf_model(tmp_path / "hf", "mistral"), tmp_path / "n", 8)
    record = open_checkpoint(step).tensors[
        model_key("decoder.layers.0.self_attention.linear_qkv.weight")
    ]
    assert len(record.boxes) == 8 + 2 + 2
    assert sum(box.numel for box, _ in record.boxes) == math.prod(record.shape)


def test_companions_travel_byte_for_byte(tmp_path: Path) -> None:
    source = save_hf_model(tmp_path / "hf", "qwen3")
    files = {
        "tokenizer_config.json": b'{"a":1,\r\n "b": "\xc3\xa9"}',
        "chat_template.jinja": b"{{ messages }}\n\n",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        "generation_config.json": b'{"temperature":0.6}',
        "LICENSE": b"licence",
    }
    for name, data in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    (source / "modeling_custom.py").write_text("raise SystemExit")
    import_checkpoint(source, tmp_path / "native", 2)
    out = export_checkpoint(tmp_path / "native", tmp_path / "back")
    for name, data in files.items():
        assert (out / name).read_bytes() == data
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*files, "config.json", "model.safetensors"}


def test_config_keeps_unknown_keys_and_speaks_both_spellings(tmp_path: Path) -> None:
    source = save_hf_model(tmp_path / "hf", "llama3", dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    config |= {"unknown": {"deep": [1, 2.5, None]}, "_name": "é"}
    (source / "config.json").write_text(json.dumps(config))
    import_checkpoint(source, tmp_path / "native")
    for name, dtype in ((None, "bfloat16"), ("fp32", "float32")):
        options = ExportOptions(dtype=name)  # type: ignore[arg-type]
        out = export_checkpoint(tmp_path / "native", tmp_path / f"back{name}", options)
        written = json.loads((out / "config.json").read_text())
        assert {k: written[k] for k in config if k != "dtype"} == {
            k: v for k, v in config.items() if k != "dtype"
        }
        assert written["dtype"] == written["torch_dtype"] == dtype
        assert written["rope_theta"] == 5000.0
        assert written["rope_scaling"]["rope_type"] == "llama3"
        assert written["rope_scaling"]["original_max_position_embeddings"] == 16
        whole = content(out)
        assert {str(value.dtype) for value in whole.values()} == {f"torch.{dtype}"}
    assert all(torch.equal(v, whole[k].bfloat16()) for k, v in content(source).items())


def scratch(root: Path, config: TransformerConfig, family: str | None = "llama") -> Path:
    """A checkpoint of a model that never had a source, in two odd pieces a tensor."""
    generator = torch.Generator().manual_seed(5)
    shards: list[list[SavedTensor]] = [[], []]
    for name, shape in make_plan(FAMILY, config).native_shapes.items():
        value = torch.randn(shape, generator=generator)
        cut = shape[0] // 3
        for rank, (start, rows) in enumerate(((0, cut), (cut, shape[0] - cut))):
            box = Box((start,) + (0,) * (len(shape) - 1), (rows, *shape[1:]))
            local = BoxCopy(Box.whole(box.shape), box)
            part = value[start : start + rows]
            shards[rank].append(SavedTensor(model_key(name), shape, (local,), part))
    sections = {"config": config} if family is None else {"config": config, "family": family}
    return write_checkpoint(root, 7, shards, sections)


PLAIN = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=67,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (PLAIN, "LlamaForCausalLM"),
        (replace(PLAIN, tie_embeddings=True, mlp_bias=True), "LlamaForCausalLM"),
        (replace(PLAIN, qkv_bias=True, attention_output_bias=True), "LlamaForCausalLM"),
        (replace(PLAIN, sliding_window=5), "MistralForCausalLM"),
        # transformers refuses a Llama whose width its heads do not divide.
        (replace(PLAIN, hidden_size=30, head_dim=8), "MistralForCausalLM"),
        (replace(PLAIN, qkv_bias=True), "Qwen2ForCausalLM"),
        (
            replace(PLAIN, qkv_bias=True, sliding_window=5, sliding_window_layers=(1,)),
            "Qwen2ForCausalLM",
        ),
        (replace(PLAIN, qk_norm="rmsnorm", rope=RopeConfig(theta=99.0)), "Qwen3ForCausalLM"),
    ],
)
def test_a_model_without_source_finds_its_class(
    tmp_path: Path, config: TransformerConfig, architecture: str
) -> None:
    from transformers import AutoModelForCausalLM

    scratch(tmp_path / "native", config)
    out = export_checkpoint(tmp_path / "native", tmp_path / "hf")
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == architecture
    assert not any(info.values()), info
    assert model.config.eos_token_id is None
    # And in again: the same tensors in the same places.
    import_checkpoint(out, tmp_path / "again", 2)
    a, b = (open_checkpoint(tmp_path / name) for name in ("native", "again"))
    for name, record in a.tensors.items():
        left, right = torch.empty(record.shape), torch.empty(record.shape)
        a.read_box(name, Box.whole(record.shape), left)
        b.read_box(name, Box.whole(record.shape), right)
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(PLAIN, gated_mlp=False), "gated_mlp: False and True"),
        (replace(PLAIN, qk_norm="rmsnorm", mlp_bias=True), "Qwen3ForCausalLM cannot say mlp_bias"),
        (replace(PLAIN, rope=RopeConfig(partial_factor=0.5)), "partial_rotary_factor"),
        (replace(PLAIN, attention_scale=0.5), "attention_scale"),
    ],
)
def test_a_model_that_no_class_can_say_is_refused(
    tmp_path: Path, config: TransformerConfig, words: str
) -> None:
    scratch(tmp_path / "native", config)
    with pytest.raises(ConversionError, match=words):
        export_checkpoint(tmp_path / "native", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_tokenizer_of_an_option_comes_along_with_its_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = tmp_path / "tok"
    folder.mkdir()
    vocabulary = {"a": 0, "<end>": 5, "<pad>": 6}
    Tokenizer(WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "pad_token": {"content": "<pad>"}, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    scratch(tmp_path / "native", PLAIN)
    options = ExportOptions(tokenizer=folder)
    out = export_checkpoint(tmp_path / "native", tmp_path / "hf", options)
    written = json.loads((out / "config.json").read_text())
    assert [written[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [None, 5, 6]
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(ConversionError, match=r"--tokenizer .*absent is not a folder"):
        export_checkpoint(
            tmp_path / "native", tmp_path / "x", ExportOptions(tokenizer=tmp_path / "absent")
        )
    with pytest.raises(ConfigError, match="--shard-gb is 0"):
        export_checkpoint(tmp_path / "native", tmp_path / "x", ExportOptions(shard_gb=0))


def test_ids_of_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    step = scratch(tmp_path / "native", replace(PLAIN, vocab_size=280))
    (step / "hf").mkdir()
    text = "some words of a text, and some more of them"
    train_sentencepiece([text], step / "hf" / "tokenizer.model", vocab_size=280)
    out = export_checkpoint(tmp_path / "native", tmp_path / "hf")
    written = json.loads((out / "config.json").read_text())
    assert [written[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [1, 2, None]


def test_a_tokenizer_that_a_run_kept_is_enough(tmp_path: Path) -> None:
    step = scratch(tmp_path / "native", PLAIN)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    (step / "hf").mkdir()
    vocabulary = {"a": 0, "<end>": 66}
    Tokenizer(WordLevel(vocabulary, unk_token="a")).save(str(step / "hf" / "tokenizer.json"))
    (step / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    out = export_checkpoint(tmp_path / "native", tmp_path / "hf")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 66

    vocabulary["<more>"] = 67
    Tokenizer(WordLevel(vocabulary, unk_token="a")).save(str(step / "hf" / "tokenizer.json"))
    with pytest.raises(ConversionError, match="68 tokens and the model a vocabulary of 67"):
        export_checkpoint(tmp_path / "native", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_head_that_differs_is_kept_and_config_says_so(tmp_path: Path) -> None:
    """config.json calls them tied, the tensors are two."""
    source = save_hf_model(tmp_path / "hf", "qwen2")
    tensors = content(source)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    import_checkpoint(source, tmp_path / "native", 2)
    out = export_checkpoint(tmp_path / "native", tmp_path / "back")
    assert_same_bits(source, out)
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_what_training_changed_is_changed_in_config(tmp_path: Path) -> None:
    """A checkpoint that remembers its source, of a model with a longer context."""
    source = save_hf_model(tmp_path / "hf", "llama_linear")
    reader = open_checkpoint(import_checkpoint(source, tmp_path / "native"))
    config = config_from_json(TransformerConfig, reader.sections["config"])
    rope = replace(config.rope, factor=16.0)
    tensors = []
    for name, record in reader.tensors.items():
        value, whole = torch.empty(record.shape), Box.whole(record.shape)
        reader.read_box(name, whole, value)
        tensors.append(SavedTensor(name, record.shape, (BoxCopy(whole, whole),), value))
    for changed in (replace(config, rope=rope), replace(config, sliding_window=4)):
        sections = {**reader.sections, "config": changed}
        write_checkpoint(tmp_path / "trained", 9, [tensors], sections)
        if changed.sliding_window:
            with pytest.raises(ConversionError, match="LlamaForCausalLM cannot say sliding_window"):
                export_checkpoint(tmp_path / "trained", tmp_path / "x")
        else:
            out = export_checkpoint(tmp_path / "trained", tmp_path / "back")
            written = json.loads((out / "config.json").read_text())
            assert written["rope_parameters"]["factor"] == written["rope_scaling"]["factor"] == 16.0


def test_bad_checkpoints_are_refused(tmp_path: Path) -> None:
    scratch(tmp_path / "nameless", PLAIN, family=None)
    with pytest.raises(ConversionError, match="of which model family"):
        export_checkpoint(tmp_path / "nameless", tmp_path / "out")
    export_checkpoint(tmp_path / "nameless", tmp_path / "named", family=FAMILY)

    value = SavedTensor(
        "model/x", (2,), (BoxCopy(Box.whole((2,)), Box.whole((2,))),), torch.ones(2)
    )
    sections = {"config": PLAIN, "family": "llama"}
    write_checkpoint(tmp_path / "other", 1, [[value]], sections)
    with pytest.raises(ConversionError, match=r"word_embeddings\.weight is missing"):
        export_checkpoint(tmp_path / "other", tmp_path / "out")
    with pytest.raises(CheckpointError):
        export_checkpoint(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ConversionError, match="num_experts"):
        config_from_json(TransformerConfig, {"num_experts": 4})
    with pytest.raises(ConversionError, match="incomplete"):
        config_from_json(TransformerConfig, {"num_layers": 4})
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    tied = replace(PLAIN, tie_embeddings=True)
    shapes = make_plan(FAMILY, PLAIN).native_shapes
    tensors = [
        SavedTensor(
            model_key(name),
            shape,
            (BoxCopy(Box.whole(shape), Box.whole(shape)),),
            torch.ones(shape),
        )
        for name, shape in shapes.items()
    ]
    write_checkpoint(tmp_path / "n", 1, [tensors], {"config": tied, "family": "llama"})
    with pytest.raises(ConversionError, match=r"holds model/output_layer\.weight"):
        export_checkpoint(tmp_path / "n", tmp_path / "out")


def test_outputs_that_are_not_empty_are_refused(tmp_path: Path) -> None:
    source = save_hf_model(tmp_path / "hf", "llama")
    import_checkpoint(source, tmp_path / "native")
    for function in (import_checkpoint, export_checkpoint):
        with pytest.raises(ConversionError, match="exists and is not empty"):
            function(source, tmp_path / "native")


def test_a_layout_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    source = save_hf_model(tmp_path / "hf", "llama")
    with pytest.raises(ConfigError, match="num_attention_heads 8 cannot be divided"):
        import_checkpoint(source, tmp_path / "native", 3)
    assert not (tmp_path / "native").exists()


def test_check_says_what_there_is(tmp_path: Path) -> None:
    source = save_hf_model(tmp_path / "hf", "mistral", dtype=torch.bfloat16)
    numel = sum(value.numel() for value in content(source).values())
    text = describe(check_source(source, 2))
    assert f"MistralForCausalLM of the family llama: {numel:,} parameters" in text


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    source = save_hf_model(tmp_path / "hf", "llama")
    import_checkpoint(source, tmp_path / "native")
    before = sorted(tmp_path.rglob("*"))
    with (
        disk_with_room_for(16 << 10),
        pytest.raises(ConversionError, match="again could not be written"),
    ):
        import_checkpoint(source, tmp_path / "again")
    with (
        disk_with_room_for(16 << 10),
        pytest.raises(ConversionError, match="back could not be written"),
    ):
        export_checkpoint(tmp_path / "native", tmp_path / "back")
    assert sorted(tmp_path.rglob("*")) == before


# ---- Memory --------------------------------------------------------------------------------------

MEASURE = """
import ctypes, sys, threading
from dataclasses import replace
from pathlib import Path
import torch
from converters.native import export_checkpoint, import_checkpoint
from converters.source import load_into, open_source
from core.parallel.context import Axis, ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from models.llama.model import build_llama

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def live(source):
    opened = open_source(source)
    ctx = replace(ParallelContext.single(), tp=Axis("tp", 2, 1, (0, 1), None))
    model = build_llama(opened.config, Placement(ctx, torch.bfloat16, torch.device("cpu")))
    load_into(declared_parameters(model), opened)
    return sum(p.nbytes for p in model.parameters())

def measure(name, work):
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier job freed must not hide what this one takes
    start, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    held = work()
    done.set()
    thread.join()
    print(name, peak[0] - start - (held if name == "live" else 0))

root = Path(sys.argv[1])
measure("import", lambda: import_checkpoint(root / "hf", root / "native", 2))
measure("export", lambda: export_checkpoint(root / "native", root / "back"))
measure("live", lambda: live(root / "hf"))
"""
"""Prints the largest anonymous memory of each job above its start, without the parameters of a live
model."""


def large_folder(folder: Path, config: TransformerConfig) -> int:
    """Random bf16 weights written a tensor at a time; returns the bytes of the largest."""
    folder.mkdir()
    tensors = [
        OutputTensor(name, torch.bfloat16, shape)
        for name, shape in make_plan(FAMILY, config).hf_shapes.items()
    ]
    noise = torch.randint(-(2**15), 2**15, (1 << 20,), dtype=torch.int16)

    def fetch(tensor: OutputTensor) -> Tensor:
        numel = math.prod(tensor.shape)
        whole = noise.repeat(-(-numel // noise.numel()))[:numel]
        whole[0] = zlib.crc32(tensor.name.encode()) % 2**15
        return whole.view(torch.bfloat16).view(tensor.shape)

    write_weights(folder, tensors, fetch, 10**9)
    (folder / "config.json").write_text(json.dumps(to_hf(config, "LlamaForCausalLM")))
    return max(tensor.nbytes for tensor in tensors)


def check_memory(root: Path, config: TransformerConfig, extra: int, tensors: int) -> None:
    """Import and export within `tensors` of the largest and `extra` bytes, and a live rank within
    its shard and `extra`.
    """
    largest = large_folder(root / "hf", config)
    total = sum(path.stat().st_size for path in (root / "hf").iterdir())
    allowed = tensors * largest + extra
    assert allowed < total / 2  # or the test would prove little
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(root)], check=True, stdout=subprocess.PIPE, text=True
    )
    print(f"{done.stdout}of {total} bytes")
    peaks = dict(line.split() for line in done.stdout.splitlines())
    assert int(peaks["import"]) <= allowed
    assert int(peaks["export"]) <= allowed
    assert int(peaks["live"]) <= extra


@pytest.fixture
def emptied(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: three times a checkpoint is too much to keep."""
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path)


def test_memory_of_a_conversion_is_one_tensor(emptied: Path) -> None:
    config = replace(
        PLAIN,
        num_layers=12,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=4,
        ffn_hidden_size=2560,
        vocab_size=20003,
    )
    check_memory(emptied, config, 48 << 20, tensors=1)


@pytest.mark.full
def test_memory_of_a_4_gib_conversion(emptied: Path) -> None:
    if shutil.disk_usage(emptied).free < 16 << 30:
        pytest.skip("needs 16 GiB of free disk space")
    config = replace(
        PLAIN,
        num_layers=27,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=8,
        ffn_hidden_size=8192,
        vocab_size=128003,
    )
    check_memory(emptied, config, 200 << 20, tensors=2)
