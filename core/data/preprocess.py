"""Tokenise documents into a corpus: `python -m core.data.preprocess`.

Writes exactly `OUTPUT.bin` and `OUTPUT.idx` (Megatron-LM would add the JSON key to the name), which
`--data.train OUTPUT` reads. Documents keep the order of the input, whatever the number of workers,
and never more than a few MiB per worker are in memory. Nothing is left behind when it fails.
"""

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.data.commands import run_command
from core.data.documents import Chunk, expand_inputs, read_chunks, texts
from core.data.indexed_dataset import IndexedDatasetWriter, bin_path, idx_path, optimal_dtype
from core.data.samples import Array
from core.data.tokenizers import Tokenizer, load_tokenizer
from core.errors import ConfigError, DataError

_CHUNKS_PER_WORKER = 4
_MAX_DEFAULT_WORKERS = 16


def _default_workers() -> int:
    return min(_MAX_DEFAULT_WORKERS, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Tokenise JSONL, text or Parquet files into OUTPUT.bin and OUTPUT.idx."""

    input: tuple[str, ...]
    """Files, or patterns in quotes. `.jsonl`: an object per line; `.parquet`: a document per row;
    any other: one document of UTF-8 text. `.gz` is unpacked."""
    output: str
    """Path of the corpus, without .bin or .idx."""
    tokenizer: str
    """`byte`, a SentencePiece .model file, a Hugging Face folder or tokenizer.json, or a Hub id."""
    json_key: str = "text"
    """Key, or Parquet column, that holds the text."""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""
    workers: int = field(default_factory=_default_workers)
    """Processes that tokenise; 0 for none but this one. By default one per core, up to 16."""
    overwrite: bool = False
    """Replace a corpus of the same name."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of the documents of one chunk."""

    tokens: Array
    lengths: Array
    num_empty: int
    num_bytes: int
    file_bytes: int


@dataclass
class Summary:
    """What a run has done."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __str__(self) -> str:
        skipped = f" ({self.empty:,} empty ones left out)" if self.empty else ""
        return (
            f"{self.documents:,} documents{skipped}, {self.tokens:,} tokens, "
            f"{self.text_bytes:,} bytes"
        )


@dataclass(frozen=True)
class Encoder:
    """Tokenises chunks, in any process. Carries no tokenizer: each process loads its own."""

    tokenizer: str
    json_key: str
    append_eod: bool

    def __call__(self, chunk: Chunk) -> Encoded:
        """Tokens of a chunk's documents; empty ones are left out.

        Raises:
            DataError: a document cannot be read.
        """
        tokenizer = _tokenizer(self.tokenizer)
        documents = tokenizer.encode_batch(texts(chunk, self.json_key))
        end = [tokenizer.eod] if self.append_eod else []
        filled = [ids + end for ids in documents if ids]
        dtype = optimal_dtype(tokenizer.vocab_size)
        return Encoded(
            tokens=np.array([token for ids in filled for token in ids], dtype=dtype),
            lengths=np.array([len(ids) for ids in filled], dtype=np.int32),
            num_empty=len(documents) - len(filled),
            num_bytes=chunk.num_bytes,
            file_bytes=chunk.file_bytes,
        )


def preprocess(config: PreprocessConfig) -> Summary:
    """Tokenise a corpus; see the module.

    Raises:
        ConfigError: an option that cannot work.
        DataError: input, tokenizer or output that cannot be used.
    """
    if config.workers < 0:
        raise ConfigError(f"--workers is {config.workers}: it must be at least 0")
    files = expand_inputs(config.input)
    for path in (bin_path(config.output), idx_path(config.output)):
        if path.exists() and not config.overwrite:
            raise DataError(f"{path} exists: choose another --output, or give --overwrite")
    encoder = Encoder(config.tokenizer, config.json_key, config.append_eod)
    tokenizer = _tokenizer(config.tokenizer)
    if config.append_eod:
        tokenizer.eod  # noqa: B018 - a tokenizer without one is refused before any work
    try:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        return _write(config, files, encoder, optimal_dtype(tokenizer.vocab_size))
    except OSError as error:
        raise DataError(
            f"--output {config.output} cannot be written ({error.strerror or error}): free disk "
            "space, or choose another path"
        ) from error


def _write(
    config: PreprocessConfig, files: Sequence[Path], encoder: Encoder, dtype: np.dtype[np.generic]
) -> Summary:
    summary = Summary()
    chunks = (chunk for path in files for chunk in read_chunks(path, config.json_key))
    total = sum(path.stat().st_size for path in files)
    with (
        IndexedDatasetWriter(config.output, dtype) as writer,
        tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar,
    ):
        for encoded in _encode_all(encoder, chunks, config.workers):
            writer.add_documents(encoded.tokens, encoded.lengths)
            bar.update(encoded.file_bytes)
            summary.documents += len(encoded.lengths)
            summary.empty += encoded.num_empty
            summary.tokens += len(encoded.tokens)
            summary.text_bytes += encoded.num_bytes
        writer.finish()
    return summary


def _encode_all(encoder: Encoder, chunks: Iterable[Chunk], workers: int) -> Iterator[Encoded]:
    """Encode chunks in order, a few per worker at a time."""
    if workers == 0:
        yield from map(encoder, chunks)
        return
    others = set(multiprocessing.active_children())
    # Spawned, not forked: a tokenizer's threads do not survive a fork.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(encoder, chunk))
            if len(pending) > workers * _CHUNKS_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} tokenizing processes died, perhaps for want of memory: "
            "lower --workers"
        ) from error
    except BaseException:
        # A signal may have come in the midst of the pool's bookkeeping, and the pool would wait for
        # its workers for ever: seen once.
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are many


@functools.cache
def _tokenizer(spec: str) -> Tokenizer:
    """Loaded once per process: chunks arrive one by one, and a large tokenizer takes seconds."""
    return load_tokenizer(spec)


def _main(config: PreprocessConfig) -> None:
    start = time.monotonic()
    summary = preprocess(config)
    seconds = max(time.monotonic() - start, 1e-3)
    print(f"{config.output}.bin, {config.output}.idx: {summary} in {seconds:.1f} s")
    print(
        f"{summary.documents / seconds:,.0f} documents/s, {summary.tokens / seconds:,.0f} tokens/s,"
        f" {summary.text_bytes / seconds / 1e6:,.2f} MB/s"
    )


if __name__ == "__main__":
    run_command("core.data.preprocess", PreprocessConfig, _main)
