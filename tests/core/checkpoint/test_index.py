import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.checkpoint.index import (
    BLOCK_SIZE,
    FileRecord,
    Index,
    TensorRecord,
    _checksum,
    check_compatible,
    model_key,
    optim_key,
    plain_json,
    saved_parameters,
    uncovered,
)
from core.config.transformer import TransformerConfig
from core.errors import CheckpointError
from core.parallel.cutting import whole_copy
from core.parallel.random import ZEROS
from core.parallel.sharding import Box, Declaration, declare_parameter, declared_parameters


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    start = tuple(rng.randrange(n) for n in shape)
    return Box(start, tuple(rng.randint(1, n - a) for a, n in zip(start, shape, strict=True)))


def test_uncovered_is_exact_for_random_boxes() -> None:
    rng = random.Random(0)
    for _ in range(300):
        shape = tuple(rng.randint(1, 6) for _ in range(rng.randint(0, 3)))
        target = random_box(rng, shape)
        parts = [random_box(rng, shape) for _ in range(rng.randint(0, 5))] if shape else []
        counts = torch.zeros(shape, dtype=torch.int64)
        counts[target.slices] = 1
        for part in parts:
            counts[part.slices] = 0
        for rest in uncovered(target, parts):
            counts[rest.slices] -= 1
        assert not counts.any()  # every open element is in exactly one box of the answer


def test_uncovered_of_scalars_and_empty_boxes() -> None:
    scalar = Box((), ())
    assert uncovered(scalar, []) == [scalar]
    assert uncovered(scalar, [scalar]) == []
    assert uncovered(Box((0, 0), (0, 3)), []) == []


def test_names_of_parameters() -> None:
    module = torch.nn.Module()
    declare_parameter(
        module,
        "weight",
        (2, 3),
        Declaration((2, 3), whole_copy((2, 3)), ZEROS),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    (saved,) = saved_parameters(declared_parameters(module))
    assert saved.name == model_key("weight") == "model/weight"
    assert saved.global_shape == (2, 3)
    assert saved.tensor.data_ptr() == next(module.parameters()).data_ptr()
    assert optim_key("exp_avg", "weight") == "optim/exp_avg/weight"


@pytest.fixture
def index(tmp_path: Path) -> Index:
    (tmp_path / "rank_00000.safetensors").write_bytes(bytes(100))
    file = "rank_00000.safetensors"
    boxes = ((Box((0, 0), (2, 3)), file), (Box((2, 0), (2, 3)), file))
    return Index(
        step=7,
        tensors={"model/a": TensorRecord((4, 3), torch.bfloat16, boxes)},
        files={file: FileRecord(100, (123,))},
        sections={"config": {"layers": [1, 2]}, "train_state": {"lr": 0.1, "2": None}},
        block_size=BLOCK_SIZE,
    )


def test_an_index_comes_back_as_it_was(tmp_path: Path, index: Index) -> None:
    (tmp_path / "index.json").write_text(index.dump())
    assert Index.read(tmp_path) == index
    assert index.tensors["model/a"].nbytes == 24


def test_a_changed_character_is_noticed(tmp_path: Path, index: Index) -> None:
    text = index.dump()
    path = tmp_path / "index.json"
    for at in random.Random(0).sample(range(len(text)), 200):
        path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
        with pytest.raises(CheckpointError, match=r"index\.json"):
            Index.read(tmp_path)


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        at: Any = content
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return change


def _rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["files"] = {name: content["files"].pop("rank_00000.safetensors")}
        for box in content["tensors"]["model/a"]["boxes"]:
            box[2] = name

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_file("../other.safetensors"), "is not a file name inside the checkpoint"),
        (_rename_file("/etc/passwd"), "is not a file name inside the checkpoint"),
        (_rename_file(".."), "is not a file name inside the checkpoint"),
        (_rename_file("absent.safetensors"), r"absent\.safetensors is missing"),
        (_set("files", "rank_00000.safetensors", "size", value=101), "has 100 bytes .* 101"),
        (_set("files", "rank_00000.safetensors", "crc32", value=[]), "one checksum per block"),
        (_set("tensors", "model/a", "shape", value=[3, 3]), "box of model/a leaves its shape"),
        (_set("tensors", "model/a", "boxes", 0, 0, value=[-1, 0]), "box of model/a leaves"),
        (_set("tensors", "model/a", "boxes", 0, 2, value="x"), "unknown file x"),
        (_set("tensors", "model/a", "dtype", value="F99"), "is damaged"),
        (_set("tensors", value=[]), "is damaged"),
        (_set("block_size", value=0), "block_size is 0"),
        (_set("block_size", value=1000), "block_size is 1000"),
        (_set("version", value=99), "format version 99, this program reads version 1"),
        (_set("format", value="zip"), "not the index of a Tessera checkpoint"),
    ],
)
def test_a_bad_index_is_refused_though_its_checksum_fits(
    tmp_path: Path, index: Index, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = json.loads(index.dump())
    del content["crc32"]
    change(content)
    content = {"crc32": _checksum(content), **content}
    (tmp_path / "index.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        Index.read(tmp_path)


def test_no_index_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        Index.read(tmp_path)
    for text in ("", "[]", "{", "\xff"):
        (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            Index.read(tmp_path)


def test_one_checksum_per_block_of_a_large_file(tmp_path: Path, index: Index) -> None:
    with (tmp_path / "rank_00000.safetensors").open("wb") as file:
        file.truncate(2 * BLOCK_SIZE + 1)
    record = FileRecord(2 * BLOCK_SIZE + 1, (1, 2, 3))
    (tmp_path / "index.json").write_text(
        replace(index, files={"rank_00000.safetensors": record}).dump()
    )
    assert Index.read(tmp_path).files["rank_00000.safetensors"] == record


@dataclass(frozen=True)
class Inner:
    theta: float = 1e4
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Config:
    hidden_size: int
    layers: int = 2
    rope: Inner = field(default_factory=Inner)
    newer: int | None = None


def test_plain_json() -> None:
    value = {"config": Config(8), "path": Path("a/b"), "sizes": (1, 2)}
    assert plain_json(value) == {
        "config": {
            "hidden_size": 8,
            "layers": 2,
            "rope": {"theta": 1e4, "kinds": []},
            "newer": None,
        },
        "path": "a/b",
        "sizes": [1, 2],
    }
    with pytest.raises(TypeError, match="cannot be stored as JSON"):
        plain_json({"x": torch.zeros(1)})


def test_the_same_architecture_is_compatible() -> None:
    config = Config(8, rope=Inner(kinds=("a", "b")))
    saved = plain_json(config)
    check_compatible(saved, config)
    check_compatible(saved, saved)
    del saved["newer"], saved["rope"]["theta"]  # written before these fields were there
    check_compatible(saved, config)
    llama = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        vocab_size=100,
        max_position_embeddings=64,
    )
    check_compatible(plain_json(llama), llama)


def test_another_architecture_is_named_by_its_first_fields() -> None:
    saved = plain_json(Config(8, rope=Inner(theta=5e5, kinds=("a",))))
    with pytest.raises(CheckpointError) as caught:
        check_compatible(saved, Config(16, layers=3), "step_00000001")
    assert str(caught.value) == (
        "step_00000001 is of another architecture: hidden_size is 8 there and 16 here, layers is 2 "
        "there and 3 here, rope.theta is 500000.0 there and 10000.0 here (1 more fields differ); "
        "use the checkpoint's config or another checkpoint"
    )
    with pytest.raises(CheckpointError, match="newer is absent there and 5 here"):
        check_compatible({"hidden_size": 8}, Config(8, newer=5))
    with pytest.raises(CheckpointError, match="older is 1 there and absent here"):
        check_compatible({"hidden_size": 8, "older": 1}, Config(8))
    with pytest.raises(CheckpointError, match="rope is None there"):
        check_compatible({"hidden_size": 8, "rope": None}, Config(8))
