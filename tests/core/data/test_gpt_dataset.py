import hashlib
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core.data.gpt_dataset import GPTDataset, GPTSampleOptions
from core.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from core.errors import DataError

OPTIONS = GPTSampleOptions(seq_length=8, seed=7, vocab_size=1000, eod=0)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        for length in rng.integers(0, 20, size=40):
            writer.add_document([*rng.integers(1, 1000, size=length).tolist(), 0])
        writer.finish()
    return tmp_path / "corpus"


def open_dataset(
    prefix: Path, num_samples: int | None = 30, options: GPTSampleOptions = OPTIONS
) -> GPTDataset:
    corpus = IndexedDataset(prefix)
    return GPTDataset(corpus, range(len(corpus)), num_samples, "train", options)


def cache_files(prefix: Path) -> list[Path]:
    return sorted((prefix.parent / "cache" / "GPTDataset_indices").iterdir())


def test_samples_are_the_shuffled_documents_laid_end_to_end(prefix: Path) -> None:
    dataset = open_dataset(prefix)
    line = np.concatenate([dataset._corpus.read(int(i)) for i in dataset._index.document])
    assert len(dataset) == (len(line) - 1) // 8
    for number, sample in enumerate(dataset[i] for i in range(len(dataset))):
        place = int(dataset._index.shuffle[number]) * 8
        assert sample["tokens"].tolist() == line[place : place + 8].tolist()
        assert sample["labels"].tolist() == line[place + 1 : place + 9].tolist()
        assert sample["tokens"].dtype == sample["labels"].dtype == np.int64
        assert sample["loss_mask"].dtype == np.bool_
        assert sample["loss_mask"].all()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_predictions_at_end_of_document_are_left_out_when_asked(prefix: Path) -> None:
    dataset = open_dataset(prefix, options=replace(OPTIONS, mask_eod_loss=True))
    masks = 0
    for sample in (dataset[i] for i in range(len(dataset))):
        assert (sample["loss_mask"] == (sample["tokens"] != 0)).all()
        masks += int((~sample["loss_mask"]).sum())
    assert masks > 5
    with pytest.raises(DataError, match="mask-eod-loss needs a tokenizer with"):
        open_dataset(prefix, options=replace(OPTIONS, mask_eod_loss=True, eod=None))


@pytest.mark.parametrize("mask_eod_loss", [False, True])
def test_documents_are_told_apart_when_asked(prefix: Path, mask_eod_loss: bool) -> None:
    """Token 0 ends every document of this corpus, and nothing else."""
    apart = replace(OPTIONS, separate_documents=True, mask_eod_loss=mask_eod_loss)
    dataset, plain = open_dataset(prefix, options=apart), open_dataset(prefix)
    most = 0
    for sample, other in ((dataset[i], plain[i]) for i in range(len(dataset))):
        assert (sample["tokens"] == other["tokens"]).all()
        bounds = sample["cu_seqlens"]
        assert bounds.dtype == np.int32
        ends = np.flatnonzero(sample["tokens"] == 0) + 1
        assert bounds.tolist() == sorted({0, *ends.tolist(), 8})
        # What follows an end of document is the next one's first token.
        assert (sample["loss_mask"] == (sample["tokens"] != 0)).all()
        most = max(most, len(bounds))
    assert most > 3
    assert "cu_seqlens" not in plain[0]


def test_documents_without_an_end_token_are_told_apart(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        for first in (10, 20, 30):
            writer.add_document(list(range(first, first + 3)))
        writer.finish()
    options = replace(OPTIONS, separate_documents=True, eod=None)
    sample = open_dataset(tmp_path / "corpus", None, options)[0]
    tens = sample["tokens"] // 10
    starts = [i for i in range(8) if i == 0 or tens[i] != tens[i - 1]]
    assert sample["cu_seqlens"].tolist() == [*starts, 8]
    assert (sample["loss_mask"] == (sample["labels"] // 10 == tens)).all()
    assert sample["loss_mask"].sum() == 6


def test_a_partial_sample_is_padded_and_masked(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        writer.add_document(list(range(1, 14)))
        writer.finish()
    options = replace(OPTIONS, drop_last_partial=False)
    dataset = open_dataset(tmp_path / "corpus", None, options)
    samples = sorted((dataset[i] for i in range(2)), key=lambda s: int(s["tokens"][0]))
    assert samples[1]["tokens"].tolist() == [9, 10, 11, 12, 13, 0, 0, 0]
    assert samples[1]["labels"].tolist() == [10, 11, 12, 13, 0, 0, 0, 0]
    assert samples[1]["loss_mask"].tolist() == [True] * 4 + [False] * 4
    assert samples[0]["loss_mask"].all()


def test_tokens_outside_the_vocabulary_are_refused(prefix: Path, tmp_path: Path) -> None:
    dataset = open_dataset(prefix, options=replace(OPTIONS, vocab_size=500))
    with pytest.raises(DataError, match=r"corpus\.bin holds token \d+, but .* has 500"):
        [dataset[i] for i in range(len(dataset))]
    with IndexedDatasetWriter(tmp_path / "negative", np.dtype(np.int32)) as writer:
        writer.add_document([5] * 20 + [-3] + [6] * 20)
        writer.finish()
    dataset = open_dataset(tmp_path / "negative")
    with pytest.raises(DataError, match="holds token -3"):
        [dataset[i] for i in range(len(dataset))]


def test_cache_files_are_named_by_the_md5_of_their_description(prefix: Path) -> None:
    dataset = open_dataset(prefix)
    files = [path for path in cache_files(prefix) if path.suffix != ".lock"]
    description = next(path for path in files if path.suffix == ".txt").read_bytes()
    stem = f"{hashlib.md5(description).hexdigest()}-GPTDataset-train"
    assert [path.name for path in files] == [
        f"{stem}-{name}"
        for name in (
            "description.txt",
            "document_index.npy",
            "sample_index.npy",
            "shuffle_index.npy",
        )
    ]
    assert np.load(files[2]).tolist() == dataset._index.sample.tolist()


def test_the_cache_is_used_and_maps_its_files(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_dataset(prefix)
    assert isinstance(first._index.sample, np.memmap)
    monkeypatch.setattr(GPTDataset, "_build", lambda self: pytest.fail("built twice"))
    again = open_dataset(prefix)
    assert all((again[i]["tokens"] == first[i]["tokens"]).all() for i in range(len(first)))


@pytest.mark.parametrize("name", ["document_index", "sample_index", "shuffle_index"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "absent", "shape"])
def test_a_damaged_cache_is_rebuilt(prefix: Path, name: str, damage: str) -> None:
    want = [sample.tolist() for sample in (open_dataset(prefix)[i]["tokens"] for i in range(30))]
    path = next(path for path in cache_files(prefix) if path.name.endswith(f"{name}.npy"))
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "shape":
        np.save(path, np.load(path)[:-1])
    else:
        path.write_bytes(whole[: -4 if damage == "truncated" else 0])
    assert [open_dataset(prefix)[i]["tokens"].tolist() for i in range(30)] == want
    assert path.read_bytes() == whole


def test_a_corpus_written_anew_gets_an_index_of_its_own(prefix: Path) -> None:
    open_dataset(prefix)
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_document([3] * 400)
        writer.finish()
    dataset = open_dataset(prefix)
    assert all((dataset[i]["tokens"] == 3).all() for i in range(len(dataset)))


def _open_in_process(prefix: Path, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    dataset = open_dataset(prefix, 3000)
    digest = hashlib.md5(b"".join(dataset[i]["tokens"].tobytes() for i in range(3000)))
    results.put(digest.hexdigest())  # type: ignore[attr-defined]


def test_four_processes_may_build_at_once(prefix: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [
        context.Process(target=_open_in_process, args=(prefix, barrier, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    digests = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(digests) == 1
    names = [path.name for path in cache_files(prefix)]
    assert len(names) == 5  # four files and the lock: nothing half-written
    assert not any("partial" in name for name in names)


def test_file_systems_without_locks_are_served(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("core.data.index_cache.fcntl.flock", no_locks)
    assert len(open_dataset(prefix)) >= 30


def test_a_pickled_data_set_reopens_its_files(prefix: Path) -> None:
    dataset = open_dataset(prefix, 3000)
    data = pickle.dumps(dataset)
    assert len(data) < 2000
    assert (pickle.loads(data)[5]["tokens"] == dataset[5]["tokens"]).all()


def test_an_unwritable_cache_names_the_option(prefix: Path) -> None:
    (prefix.parent / "file").write_text("")
    options = replace(OPTIONS, cache_dir=str(prefix.parent / "file" / "cache"))
    with pytest.raises(DataError, match=r"cannot keep prepared data in .*--data.cache-dir"):
        open_dataset(prefix, options=options)


def test_too_little_text_is_named(prefix: Path) -> None:
    corpus = IndexedDataset(prefix)
    with pytest.raises(DataError, match=r"the valid split of .*corpus .*gives no sample"):
        GPTDataset(corpus, range(3, 3), 5, "valid", OPTIONS)


def test_a_corpus_of_no_tokens_is_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "floats", np.dtype(np.float32)) as writer:
        writer.add_document(np.ones(100))
        writer.finish()
    with pytest.raises(DataError, match=r"floats\.idx holds float32 numbers"):
        GPTDataset(IndexedDataset(tmp_path / "floats"), range(1), 5, "train", OPTIONS)


def test_lengths_that_contradict_offsets_are_refused(prefix: Path) -> None:
    path = prefix.with_suffix(".idx")
    data = bytearray(path.read_bytes())
    data[34] += 1  # the first length
    path.write_bytes(data)
    with pytest.raises(DataError, match="is corrupt: lengths sum to"):
        open_dataset(prefix)
