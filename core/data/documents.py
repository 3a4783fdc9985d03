"""Documents from JSONL, text and Parquet files, in pieces of bounded size.

Reading is cheap and happens in one process; `texts` decodes a piece and may run in another.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal

from core.errors import DataError

CHUNK_BYTES = 1 << 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class Chunk:
    """Some documents of one file, as they were read."""

    path: str
    kind: Literal["jsonl", "text", "parquet"]
    first: int
    """Line (from 1) or row (from 0) of the first item."""
    items: list[bytes]
    file_bytes: int
    """How much of the file was read for it: what a progress bar counts."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all items."""
        return sum(map(len, self.items))


def expand_inputs(patterns: Sequence[str], option: str = "--input") -> list[Path]:
    """Files of an option: names as given, patterns (`*`, `?`, `**`) sorted.

    Raises:
        DataError: a name or pattern stands for no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise DataError(f"{option} {pattern} is a folder: name its files, as in '{path}/**/*'")
        found = [path] if path.exists() else map(Path, sorted(glob.glob(str(path), recursive=True)))
        matches = [match for match in found if not match.is_dir()]
        if not matches:
            raise DataError(f"{option} {pattern} does not exist and matches no file")
        files += matches
    if not files:
        raise DataError(f"{option} names no file")
    return files


def read_chunks(path: Path, json_key: str) -> Iterator[Chunk]:
    """Read a file piece by piece. What it holds follows from its name.

    `.jsonl`, `.ndjson` and `.json`: one object per line; `.parquet`: one document per row; any
    other: one document of UTF-8 text. All but Parquet may be compressed, with `.gz` at the end.

    Raises:
        DataError: it cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        yield from _read_parquet(path, json_key)
        return
    compressed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if compressed else suffixes)[-1:]
    try:
        with path.open("rb") as raw:
            file: IO[bytes] = gzip.GzipFile(fileobj=raw) if compressed else raw  # type: ignore[assignment]
            if kind and kind[0] in JSON_SUFFIXES:
                yield from _read_lines(path, file, raw)
            else:
                yield Chunk(str(path), "text", 1, [file.read()], path.stat().st_size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def texts(chunk: Chunk, json_key: str) -> list[str]:
    """Decode a piece; blank lines of JSONL are left out.

    Raises:
        DataError: naming file and line, when an item is not what it should be.
    """
    if chunk.kind == "jsonl":
        return [
            _text_of_line(line, f"{chunk.path}:{number}", json_key)
            for number, line in zip(count(chunk.first), chunk.items)
            if line.strip()
        ]
    try:
        return [item.decode() for item in chunk.items]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{chunk.path} is not UTF-8 text (byte {error.start}): convert it, or leave it out"
        ) from error


def json_object(line: bytes, place: str) -> dict[str, Any]:
    """The object of one line of JSON Lines.

    Args:
        line: its bytes.
        place: file and line, for messages.

    Raises:
        DataError: there is none.
    """
    try:
        record = json.loads(line)
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise DataError(f"{place} is not a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{place} holds {type(record).__name__}, not a JSON object")
    return record


def _text_of_line(line: bytes, place: str, json_key: str) -> str:
    record = json_object(line, place)
    if not isinstance(record.get(json_key), str):
        raise DataError(
            f"{place} has no text under {json_key!r}, only keys {', '.join(map(repr, record))}: "
            "choose one with --json-key"
        )
    text = str(record[json_key])
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds {error.object[error.start]!r} under {json_key!r}, half of a character: "
            "repair the line, or leave it out"
        ) from error
    return text


def _read_lines(path: Path, file: IO[bytes], raw: IO[bytes]) -> Iterator[Chunk]:
    first, done = 1, 0
    while lines := file.readlines(CHUNK_BYTES):
        yield Chunk(str(path), "jsonl", first, lines, raw.tell() - done)
        first, done = first + len(lines), raw.tell()


def _read_parquet(path: Path, column: str) -> Iterator[Chunk]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow to be read: pip install 'tessera-zoo[data]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"{path} has no column {column!r}, only {', '.join(map(repr, names))}: choose "
                    "one with --json-key"
                )
            size, rows, first = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(_ROWS_PER_BATCH, columns=[column]):
                items = batch.column(0).to_pylist()
                for row, item in enumerate(items, first):
                    if not isinstance(item, str):
                        raise DataError(
                            f"{path} row {row} has {type(item).__name__} in column {column!r}, "
                            "not text: choose another with --json-key"
                        )
                encoded = [item.encode() for item in items]
                yield Chunk(str(path), "parquet", first, encoded, size * len(items) // rows)
                first += len(items)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
