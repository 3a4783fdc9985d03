import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from core.data.blend import (
    BlendedDataset,
    build_blending_index,
    normalize,
    samples_per_source,
)
from core.data.samples import Sample


class Numbered:
    """Sample i of source s is the pair (s, i)."""

    def __init__(self, source: int, length: int) -> None:
        self.source, self.length = source, length
        self.identifiers = self.order = {"source": source, "length": length}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        assert index < self.length
        return {"tokens": np.array([self.source, index])}


def oracle(weights: list[float], num_samples: int) -> tuple[list[int], list[int]]:
    given = [0] * len(weights)
    sources, numbers = [], []
    for i in range(num_samples):
        best, most = 0, weights[0] * max(i, 1) - given[0]
        for j in range(1, len(weights)):
            behind = weights[j] * max(i, 1) - given[j]
            if behind > most:
                best, most = j, behind
        sources.append(best)
        numbers.append(given[best])
        given[best] += 1
    return sources, numbers


@pytest.mark.parametrize("num_sources", [1, 2, 3, 7, 40])
def test_matches_the_oracle(num_sources: int) -> None:
    rng = np.random.default_rng(num_sources)
    for weights in (rng.random(num_sources) + 1e-3, np.ones(num_sources)):
        shares = normalize(weights.tolist())
        sources, numbers = build_blending_index(shares, 2000)
        assert (sources.tolist(), numbers.tolist()) == oracle(shares, 2000)
        assert sources.dtype == np.int16
        assert numbers.dtype == np.int64


def test_golden_values() -> None:
    """Weights 0.7 and 0.3 by hand; at i = 0 and at i = 1 the factor is 1."""
    sources, numbers = build_blending_index([0.7, 0.3], 10)
    assert sources.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert numbers.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]


def test_samples_per_source() -> None:
    assert samples_per_source(normalize([30, 70]), 1000) == [302, 704]
    assert samples_per_source(normalize([1, 2]), 10) == [5, 8]


def test_no_source_is_asked_for_more_than_was_built() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        weights = (rng.random(rng.integers(1, 30)) ** 4 + 1e-4).tolist()
        num_samples = int(rng.integers(1, 500))
        built = samples_per_source(normalize(weights), num_samples)
        sources, _ = build_blending_index(normalize(normalize(weights)), num_samples)
        used = np.bincount(sources, minlength=len(weights))
        assert (used <= built).all()


def test_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = [Numbered(0, 705), Numbered(1, 305)]
    blended = BlendedDataset(datasets, [7.0, 3.0], 1000, tmp_path)
    pairs = [tuple(blended[i]["tokens"].tolist()) for i in range(1000)]
    assert pairs == list(zip(*oracle([0.7, 0.3], 1000), strict=True))
    with pytest.raises(IndexError):
        blended[1000]
    monkeypatch.setattr(BlendedDataset, "_build", lambda self: pytest.fail("built twice"))
    again = BlendedDataset(datasets, [7.0, 3.0], 1000, tmp_path)
    assert again[999]["tokens"].tolist() == blended[999]["tokens"].tolist()
    copy = pickle.loads(pickle.dumps(blended))
    assert copy[999]["tokens"].tolist() == blended[999]["tokens"].tolist()


def test_sizes_as_weights_are_normalised_once(tmp_path: Path) -> None:
    """As Megatron-LM does; of these, the second time changes the last bit, and then the order."""
    sizes = [280, 398, 126, 236]
    datasets = [Numbered(source, size) for source, size in enumerate(sizes)]
    blended = BlendedDataset(datasets, sizes, sum(sizes), tmp_path)
    order = [int(blended[i]["tokens"][0]) for i in range(len(blended))]
    assert order == oracle(normalize(sizes), sum(sizes))[0]
    assert order != oracle(normalize(normalize(sizes)), sum(sizes))[0]


def test_a_source_of_one_epoch_wraps_around(tmp_path: Path) -> None:
    blended = BlendedDataset([Numbered(0, 2), Numbered(1, 2)], [2, 2], 8, tmp_path)
    pairs = [tuple(blended[i]["tokens"].tolist()) for i in range(8)]
    assert sorted(pairs) == sorted([(s, i) for s in (0, 1) for i in (0, 1)] * 2)


def test_a_million_samples_take_seconds() -> None:
    start = time.process_time()
    build_blending_index(normalize([5, 20, 30, 45]), 200_000)
    assert time.process_time() - start < 3.0  # 15 s a million at the very worst; 2 s as measured
