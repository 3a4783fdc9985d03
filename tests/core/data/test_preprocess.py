import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from core.data import documents
from core.data.documents import Chunk
from core.data.indexed_dataset import IndexedDataset
from core.data.preprocess import Encoder, PreprocessConfig, _encode_all, preprocess
from core.errors import ConfigError, DataError

TEXTS = [f"document {i} 漢字\n" * (i % 7) for i in range(300)]  # every seventh is empty
FILLED = [text for text in TEXTS if text]


def corpus(prefix: Path) -> list[str]:
    data = IndexedDataset(prefix)
    decoded = []
    for i in range(len(data)):
        *text, eod = data.read(i).tolist()
        assert eod == 256
        decoded.append(bytes(text).decode())
    return decoded


def write_jsonl(path: Path, key: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, key: text}) + "\n\n" for i, text in enumerate(TEXTS))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def config(
    *inputs: Path | str, output: Path, json_key: str = "text", workers: int = 0
) -> PreprocessConfig:
    return PreprocessConfig(
        input=tuple(map(str, inputs)),
        output=str(output),
        tokenizer="byte",
        json_key=json_key,
        workers=workers,
    )


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.JSON"])
def test_jsonl(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    summary = preprocess(config(write_jsonl(tmp_path / name), output=tmp_path / "out" / "corpus"))
    assert corpus(tmp_path / "out" / "corpus") == FILLED
    assert summary.documents == len(FILLED)
    assert summary.empty == len(TEXTS) - len(FILLED)
    assert summary.tokens == sum(len(text.encode()) + 1 for text in FILLED)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["corpus.bin", "corpus.idx"]


def test_text_is_one_document_per_file_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(f"text of {name}\nand more", newline="")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"zipped"))
    inputs = (tmp_path / "z.txt.gz", f"{tmp_path}/**/*.txt")
    preprocess(config(*inputs, output=tmp_path / "corpus"))
    expected = [f"text of {name}\nand more" for name in ("a.txt", "b.txt", "sub/c.txt")]
    assert corpus(tmp_path / "corpus") == ["zipped", *expected]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"id": list(range(300)), "body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "docs.parquet", row_group_size=70)
    preprocess(config(tmp_path / "docs.parquet", output=tmp_path / "corpus", json_key="body"))
    assert corpus(tmp_path / "corpus") == FILLED


def test_two_workers_write_the_same_bytes_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
    path = write_jsonl(tmp_path / "docs.jsonl")
    for workers in (0, 2):
        preprocess(config(path, output=tmp_path / str(workers), workers=workers))
    for suffix in ("bin", "idx"):
        none, two = ((tmp_path / f"{workers}.{suffix}").read_bytes() for workers in (0, 2))
        assert none == two
    assert len(IndexedDataset(tmp_path / "2")) == len(FILLED)


def test_without_end_of_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    options = PreprocessConfig(
        input=(str(tmp_path / "a.txt"),),
        output=str(tmp_path / "corpus"),
        tokenizer="byte",
        append_eod=False,
        workers=0,
    )
    preprocess(options)
    data = IndexedDataset(tmp_path / "corpus")
    assert data.read(0).tolist() == [97, 98, 99]
    assert data.dtype == np.uint16


_CHUNKS = [Chunk("f", "text", 1, [b"x%d" % i], 1) for i in range(100)]


def test_reading_ahead_is_bounded() -> None:
    taken = 0

    def chunks() -> Iterator[Chunk]:
        nonlocal taken
        for chunk in _CHUNKS:
            taken += 1
            yield chunk

    encoded = _encode_all(Encoder("byte", "text", True), chunks(), 1)
    next(encoded)
    assert taken <= 6
    assert sum(1 for _ in encoded) == 99


def test_a_dead_worker_is_an_error() -> None:
    with pytest.raises(DataError, match="one of 1 tokenizing processes died"):
        list(_encode_all(os._exit, iter([3]), 1))  # type: ignore[arg-type]


def test_an_error_ends_no_process_but_the_pool_s() -> None:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    others = set(multiprocessing.active_children())
    try:
        encoded = _encode_all(Encoder("byte", "text", True), _CHUNKS, 1)
        next(encoded)
        started = set(multiprocessing.active_children()) - others
        assert started
        with pytest.raises(KeyboardInterrupt):
            encoded.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
        assert child.is_alive()
        assert not any(process.is_alive() for process in started)
    finally:
        child.kill()
        child.join()


# Without the time: processes that share the tests out must know them by the same names.
CUT_SHORT = gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl:2 is not a JSON object: Expecting"),
        ("x.jsonl", b'{"text": "a"}\n\n[1]\n', r"x\.jsonl:3 holds list, not a JSON object"),
        ("x.jsonl", b'{"body": "a"}\n', r"x\.jsonl:1 has no text under 'text', only keys 'body'"),
        ("x.jsonl", b'{"text": 3}\n', r"x\.jsonl:1 has no text under 'text'"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"x\.jsonl:1 is not a JSON object"),
        ("x.txt", b"abc\xff", r"x\.txt is not UTF-8 text \(byte 3\)"),
        ("x.jsonl.gz", b"no gzip", r"cannot read .*x\.jsonl\.gz"),
        ("x.jsonl.gz", CUT_SHORT, r"cannot read .*x\.jsonl\.gz"),
        ("x.parquet", b"no parquet", r"cannot read .*x\.parquet"),
        ("x.txt", b"", "no document has text"),
        ("x.jsonl", b"", "no document has text"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    refuse_input(tmp_path, name, content, message, workers=0)


def refuse_input(tmp_path: Path, name: str, content: bytes, message: str, workers: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "out").mkdir()
    options = config(tmp_path / "in" / name, output=tmp_path / "out" / "corpus", workers=workers)
    with pytest.raises(DataError, match=message):
        preprocess(options)
    assert not list((tmp_path / "out").iterdir())


def test_errors_come_through_from_a_worker(tmp_path: Path) -> None:
    content, message = b'{"text": "a"}\n[1]\n', r"x\.jsonl:2 holds list, not a JSON object"
    refuse_input(tmp_path, "x.jsonl", content, message, workers=1)


def test_bad_parquet_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": [None]}), path)
    with pytest.raises(DataError, match=r"x\.parquet has no column 'body', only 'id', 'text'"):
        preprocess(config(path, output=tmp_path / "corpus", json_key="body"))
    with pytest.raises(DataError, match=r"x\.parquet row 0 has NoneType in column 'text'"):
        preprocess(config(path, output=tmp_path / "corpus"))


def test_bad_options_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs.jsonl")
    with pytest.raises(ConfigError, match="--workers is -1"):
        preprocess(config(path, output=tmp_path / "corpus", workers=-1))
    with pytest.raises(DataError, match="nothing_\\* does not exist and matches no file"):
        preprocess(config("nothing_*", output=tmp_path / "corpus"))
    with pytest.raises(DataError, match="is a folder"):
        preprocess(config(tmp_path, output=tmp_path / "corpus"))
    preprocess(config(path, output=tmp_path / "corpus"))
    with pytest.raises(DataError, match=r"corpus\.bin exists: choose another --output"):
        preprocess(config(path, output=tmp_path / "corpus"))


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "core.data.preprocess", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_command_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs.jsonl")
    output = str(tmp_path / "corpus")
    options = ["--input", str(path), "--output", output, "--tokenizer", "byte", "--workers", "1"]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bar without a terminal
    assert "257 documents (43 empty ones left out)" in done.stdout
    assert "tokens/s" in done.stdout
    again = run(*options)
    assert again.returncode == 1
    assert again.stdout == ""
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    assert run(*options, "--overwrite").returncode == 0


@pytest.mark.parametrize("module", ["core.data.preprocess", "core.data.train_tokenizer"])
def test_help_is_fast_and_imports_nothing_heavy(module: str) -> None:
    code = (
        f"import runpy, sys, time; start = time.perf_counter()\n"
        f"sys.argv = ['x', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        f"except SystemExit as end: assert end.code == 0\n"
        f"heavy = {{'torch', 'transformers', 'sentencepiece', 'pyarrow'}} & set(sys.modules)\n"
        f"assert not heavy, heavy\n"
        f"assert time.perf_counter() - start < 1.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m {module}" in done.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, number: int, status: int) -> None:
    line = json.dumps({"text": "some words " * 1000}) + "\n"
    path = tmp_path / "docs.jsonl.gz"
    path.write_bytes(gzip.compress(line.encode() * 10_000, 1))
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "core.data.preprocess", "--input", str(path)]
    command += ["--output", str(out / "corpus"), "--tokenizer", "byte", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in out.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert not list(out.iterdir())


def test_a_tokenizer_is_trained_from_the_command_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "docs.jsonl")
    command = [sys.executable, "-m", "core.data.train_tokenizer", "--input", str(path)]
    command += ["--vocab-size", "290", "--output"]
    for output, status, message in (
        ("tok.model", 0, ""),
        ("tok.model", 1, "exists: choose another --output"),
        ("tok.json", 2, "must end in .model"),
    ):
        done = subprocess.run(
            [*command, str(tmp_path / output)], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
        assert message in done.stderr
    model = str(tmp_path / "tok.model")
    options = ["--input", str(path), "--output", str(tmp_path / "corpus"), "--tokenizer", model]
    done = run(*options, "--workers", "0")
    assert done.returncode == 0, done.stderr
    data = IndexedDataset(tmp_path / "corpus")
    assert len(data) == len(FILLED)
    assert all(data.read(i)[-1] == 2 for i in range(len(data)))
