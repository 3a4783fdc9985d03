"""What a checkpoint says of itself: which boxes of which global tensors lie in which file.

The unit is a local tensor and the boxes of a named global tensor that it holds, never a parameter,
so a flat piece of a sharded optimizer state is saved like a weight. Names are prefixed by
namespace: `model/<global name>` and `optim/<state>/<global name>`.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.safetensors_io import DTYPE_NAMES, DTYPES
from core.errors import CheckpointError, DamagedCheckpointError
from core.parallel.sharding import Box, BoxCopy, DeclaredParameter

FORMAT = "tessera-checkpoint"
VERSION = 1
INDEX_NAME = "index.json"
BLOCK_SIZE = 16 << 20


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A local tensor and what it holds of a global one; elements in no copy are padding.

    The same description serves to save and, with the tensor as destination, to load.
    """

    name: str
    """Namespace and global name."""
    global_shape: tuple[int, ...]
    copies: tuple[BoxCopy, ...]
    tensor: Tensor
    """On any device; on `meta` if a `fetch` function supplies the data."""


def model_key(name: str) -> str:
    """Name of a model parameter in a checkpoint."""
    return f"model/{name}"


def optim_key(state: str, name: str) -> str:
    """Name in a checkpoint of an optimizer's state of a parameter, such as `exp_avg`."""
    return f"optim/{state}/{name}"


def saved_parameters(parameters: Mapping[str, DeclaredParameter]) -> list[SavedTensor]:
    """The parameters of a model as a checkpoint names them."""
    return [
        SavedTensor(
            model_key(name),
            declared.sharding.global_shape,
            declared.sharding.copies,
            declared.local,
        )
        for name, declared in parameters.items()
    ]


@dataclass(frozen=True)
class TensorRecord:
    """A global tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[tuple[Box, str], ...]
    """Every stored box with the name of its file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes of a file, and the CRC-32 of each of its blocks."""

    size: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """The content of `index.json`."""

    step: int
    tensors: Mapping[str, TensorRecord]
    files: Mapping[str, FileRecord]
    """By path relative to the step directory: those of the ranks, and assets in `hf/`."""
    sections: Mapping[str, Any]
    """JSON of the caller: `config`, `train_state`, `source`."""
    block_size: int

    def dump(self) -> str:
        """JSON text, with a checksum over its own content."""
        content = plain_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "step": self.step,
                "block_size": self.block_size,
                "tensors": {
                    name: {
                        "shape": record.shape,
                        "dtype": DTYPE_NAMES[record.dtype],
                        "boxes": [(box.start, box.shape, file) for box, file in record.boxes],
                    }
                    for name, record in self.tensors.items()
                },
                "files": {name: dataclasses.asdict(file) for name, file in self.files.items()},
                "sections": self.sections,
            }
        )
        return json.dumps({"crc32": _checksum(content), **content})

    @classmethod
    def read(cls, directory: Path) -> "Index":
        """Read and check the index of a step directory: its own checksum, its fields, and that
        all files are there in full size.

        Raises:
            DamagedCheckpointError: it is absent or damaged, names a path outside the directory, or
                a file is missing or truncated.
            CheckpointError: it is of another version.
        """
        path = directory / INDEX_NAME
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise DamagedCheckpointError(f"{path} is not the index of a Tessera checkpoint")
            # Every version begins with these fields and this checksum, so that another version is
            # told from damage. The text counts too: white space has no part in the checksum.
            if content.get("crc32") != _checksum(_without(content, "crc32")) or text != json.dumps(
                content
            ):
                raise DamagedCheckpointError(
                    f"{path} does not match its own checksum: it is damaged"
                )
            if content["version"] != VERSION:
                raise CheckpointError(
                    f"{path} has format version {content['version']}, this program reads version "
                    f"{VERSION}: use the version of Tessera that wrote it"
                )
            index = _decode(content)
        except OSError as error:
            raise DamagedCheckpointError(
                f"{directory} is not a complete checkpoint: {path} cannot be read ({error})"
            ) from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(f"{path} is damaged: {error}") from None
        for name, record in index.files.items():
            file = directory / name
            size = file.stat().st_size if file.is_file() else None
            if size != record.size:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DamagedCheckpointError(
                    f"{file} {found} where {path} describes {record.size} bytes: restore the file "
                    "or use another checkpoint"
                )
        return index


def _decode(content: dict[str, Any]) -> Index:
    files, block_size = {}, content["block_size"]
    if block_size < 1 or block_size % 16:  # so that no number lies in two blocks
        raise ValueError(f"block_size is {block_size}")
    for name, value in content["files"].items():
        if not _lies_inside(name):
            raise ValueError(f"{name!r} is not a file name inside the checkpoint")
        files[name] = FileRecord(int(value["size"]), tuple(value["crc32"]))
        if len(value["crc32"]) != -(-files[name].size // block_size):
            raise ValueError(f"{name} does not have one checksum per block")
    tensors = {}
    for name, value in content["tensors"].items():
        whole = Box.whole(value["shape"])
        boxes = []
        for start, shape, file in value["boxes"]:
            box = Box(tuple(start), tuple(shape))
            if file not in files or box.intersect(whole) != box:
                raise ValueError(f"a box of {name} leaves its shape or lies in unknown file {file}")
            boxes.append((box, file))
        tensors[name] = TensorRecord(whole.shape, DTYPES[value["dtype"]], tuple(boxes))
    return Index(content["step"], tensors, files, content["sections"], block_size)


def _lies_inside(name: str) -> bool:
    """Whether a file's name is a path below a checkpoint, written in the one way that counts."""
    path = PurePosixPath(name)
    plain = path.as_posix() == name and "\\" not in name and "\0" not in name
    return plain and name != "." and not path.is_absolute() and ".." not in path.parts


def _without(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != key}


def plain_json(value: Any) -> Any:
    """A value as it comes back from JSON; dataclasses become objects, paths text.

    Raises:
        TypeError: JSON cannot hold it.
    """

    def encode(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, PurePath):
            return str(item)
        if isinstance(item, Mapping):
            return dict(item)
        raise TypeError(f"{type(item).__name__} {item!r} cannot be stored as JSON")

    return json.loads(json.dumps(value, default=encode))


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def uncovered(box: Box, parts: Iterable[Box]) -> list[Box]:
    """What `parts`, which may overlap, leave of `box`: disjoint boxes, none where all is
    covered.
    """
    left = [box] if box.numel else []
    for part in parts:
        left = [piece for one in left for piece in _subtract(one, part)]
        if not left:
            break
    return left


def _subtract(box: Box, hole: Box) -> Iterator[Box]:
    common = box.intersect(hole)
    if common is None:
        yield box
        return
    start, shape = list(box.start), list(box.shape)

    def slab(dim: int, first: int, count: int) -> Iterator[Box]:
        if count:
            yield Box(
                (*start[:dim], first, *start[dim + 1 :]), (*shape[:dim], count, *shape[dim + 1 :])
            )

    for dim, (first, count) in enumerate(zip(common.start, common.shape, strict=True)):
        yield from slab(dim, start[dim], first - start[dim])
        yield from slab(dim, first + count, start[dim] + shape[dim] - first - count)
        start[dim], shape[dim] = first, count


def check_compatible(saved: Any, expected: Any, where: str = "the checkpoint") -> None:
    """Compare the architecture of a checkpoint with the one that is to be filled.

    A field that is absent from the checkpoint, being newer than it, counts as its default. Fields
    that the config's class names in `INCIDENTAL` may differ.

    Args:
        saved: the index's section `config`.
        expected: a mapping or a config dataclass.
        where: the checkpoint, for the error's sentence.

    Raises:
        CheckpointError: naming the first fields that differ, with both values.
    """
    incidental = getattr(type(expected), "INCIDENTAL", ())
    found = [
        difference
        for difference in _differences(plain_json(saved), expected, "")
        if difference[0] not in incidental
    ]
    if found:
        fields = ", ".join(f"{name} is {a} there and {b} here" for name, a, b in found[:3])
        more = f" ({len(found) - 3} more fields differ)" if len(found) > 3 else ""
        raise CheckpointError(
            f"{where} is of another architecture: {fields}{more}; use the checkpoint's config or "
            "another checkpoint"
        )


def _differences(saved: Any, expected: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    defaults: dict[str, Any] = {}
    if dataclasses.is_dataclass(expected) and not isinstance(expected, type):
        for field in dataclasses.fields(expected):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
        expected = {f.name: getattr(expected, f.name) for f in dataclasses.fields(expected)}
    if not isinstance(saved, Mapping) or not isinstance(expected, Mapping):
        if plain_json(expected) != saved:
            yield path, saved, plain_json(expected)
        return
    for name in (*expected, *(name for name in saved if name not in expected)):
        at = f"{path}.{name}" if path else name
        if name not in expected:
            yield at, saved[name], "absent"
        elif name in saved:
            yield from _differences(saved[name], expected[name], at)
        elif name not in defaults or defaults[name] != expected[name]:
            yield at, "absent", expected[name]
