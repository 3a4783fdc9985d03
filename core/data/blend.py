"""Mixtures of data sets in given proportions, in Megatron-LM's order."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from core.data.index_cache import cached_arrays
from core.data.samples import Array, Sample, SampleDataset, check_index

# Sources are built a little larger than their share, so that none runs out before the blend does.
_SURPLUS = 0.005


class IdentifiedDataset(SampleDataset, Protocol):
    """A data set that can say what its samples follow from."""

    @property
    def identifiers(self) -> Mapping[str, object]: ...  # noqa: D102

    @property
    def order(self) -> Mapping[str, object]: ...  # noqa: D102


def normalize(weights: Sequence[float]) -> list[float]:
    """Scale to a sum of 1, with numpy's rounding."""
    array = np.array(weights, dtype=np.float64)
    return [float(weight) for weight in array / np.sum(array)]


def samples_per_source(shares: Sequence[float], num_samples: int) -> list[int]:
    """How many samples to build of each source of a blend of `num_samples`; shares sum to 1."""
    return [math.ceil(math.ceil(num_samples * share) * (1 + _SURPLUS)) for share in shares]


def build_blending_index(weights: Sequence[float], num_samples: int) -> tuple[Array, Array]:
    """Choose a source for every sample: the one furthest behind its share.

    Source j is behind by w_j * max(i, 1) - n_j at sample i, when it has given n_j; the first of
    equals is taken. One step depends on the last, so this is a loop: about 2 s for a million.

    Args:
        weights: w, sum 1.
        num_samples: length of the blend.

    Returns:
        Source of each sample [num_samples] int16, and its number within the source, int64.
    """
    shares = np.array(weights, dtype=np.float64)
    given = np.zeros_like(shares)
    behind = np.empty_like(shares)
    sources = np.empty(num_samples, dtype=np.int16)
    numbers = np.empty(num_samples, dtype=np.int64)
    for i in range(num_samples):
        np.multiply(shares, max(i, 1), out=behind)
        np.subtract(behind, given, out=behind)
        source = behind.argmax()
        sources[i] = source
        numbers[i] = given[source]
        given[source] += 1
    return sources, numbers


class BlendedDataset:
    """Samples of several data sets, in proportion to weights.

    Args:
        datasets: the sources.
        weights: above 0; they need not sum to 1.
        num_samples: length of the blend.
        cache_dir: of the blending index.
    """

    def __init__(
        self,
        datasets: Sequence[IdentifiedDataset],
        weights: Sequence[float],
        num_samples: int,
        cache_dir: str | Path,
    ) -> None:
        self._datasets = tuple(datasets)
        self._weights = normalize(weights)
        self._num_samples = num_samples
        self._cache_dir = Path(cache_dir)
        self._index  # noqa: B018 - built before training starts

    def __len__(self) -> int:
        return self._num_samples

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_index"}

    def __getitem__(self, index: int) -> Sample:
        """The sample of the source whose turn it is."""
        check_index(index, len(self))
        sources, numbers = self._index
        dataset = self._datasets[sources[index]]
        # Rounding can ask a source of one whole epoch for one sample more than it has.
        return dataset[int(numbers[index]) % len(dataset)]

    @property
    def order(self) -> dict[str, object]:
        """See `GPTDataset.order`; a longer blend begins as a shorter one does."""
        return {"weights": self._weights, "source": [dict(one.order) for one in self._datasets]}

    @cached_property
    def _index(self) -> tuple[Array, Array]:
        name, shape = type(self).__name__, (self._num_samples,)
        arrays = cached_arrays(
            self._cache_dir,
            name,
            {
                "class": name,
                "datasets": [dataset.identifiers for dataset in self._datasets],
                "weights": self._weights,
                "size": self._num_samples,
            },
            {
                "dataset_index": (np.dtype(np.int16), shape),
                "dataset_sample_index": (np.dtype(np.int64), shape),
            },
            self._build,
        )
        return arrays["dataset_index"], arrays["dataset_sample_index"]

    def _build(self) -> dict[str, Array]:
        sources, numbers = build_blending_index(self._weights, self._num_samples)
        return {"dataset_index": sources, "dataset_sample_index": numbers}
