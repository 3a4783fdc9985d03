"""Microbatches for one data-parallel rank, loaded ahead of the training loop.

A step's global batch is the samples from `consumed_samples` on. Rank r of dp takes, in microbatch
m, samples m * dp * b + r * b to + b - 1 of it (Megatron-LM's sequential order). Position is this
one integer: any number of ranks and any microbatch size see the same global batch, and a run
resumes anywhere without reading what came before.

Shapes: b = samples per microbatch, s = seq_length.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from core.data.samples import Array, SampleDataset
from core.errors import DataError, TesseraError


@dataclass(frozen=True)
class Batch:
    """One microbatch of one rank, on the CPU until `to`."""

    tokens: torch.Tensor
    """[b, s] int64."""
    labels: torch.Tensor
    """[b, s] int64: the token after each."""
    loss_mask: torch.Tensor
    """[b, s] bool: the labels that the loss counts."""
    first_sample: int
    """Number of its first sample within the global batch."""
    cu_seqlens: torch.Tensor | None = None
    """[b, n + 1] int32: where the documents of each row begin, and s until the row is full; None
    where a row is one text. n is a power of two, so that shapes are few."""

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, without waiting for the copy if the memory is pinned."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class _Step:
    consumed_samples: int
    num_microbatches: int


@dataclass
class BatchLoader:
    """Fetches whole steps, and keeps the next ones ready in background processes.

    Steps must be asked for in order to come from the background; any other step, such as the first
    after a resume or of an evaluation, is loaded while the caller waits. Every pipeline stage and
    tensor-parallel rank loads the microbatches of its data-parallel rank itself.
    """

    dataset: SampleDataset
    _: KW_ONLY
    dp_rank: int
    dp_size: int
    microbatch_size: int
    num_workers: int = 0
    """Background processes; 0 loads in `fetch`."""
    prefetch: int = 2
    """Steps that each process keeps ready."""
    pin_memory: bool = False
    """Page-lock batches, so that copies to a GPU overlap; needs one."""
    num_microbatches_at: Callable[[int], int] | None = None
    """Microbatches per rank of the step that begins at this number of consumed samples, if the
    global batch grows; by default as many as in the step before."""
    _expected: _Step | None = field(default=None, init=False)
    _steps: "_UpcomingSteps" = field(init=False)
    _loader: "DataLoader[Any] | None" = field(default=None, init=False)
    _iterator: Iterator[Any] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._steps = _UpcomingSteps(self)

    def fetch(self, consumed_samples: int, num_microbatches: int) -> list[Batch]:
        """All microbatches of this rank in one step.

        Args:
            consumed_samples: samples of all ranks in the steps before.
            num_microbatches: per rank, in this step.

        Raises:
            DataError: the data set ends before the step does, or holds damaged data.
        """
        step = _Step(consumed_samples, num_microbatches)
        if self.end_of(step) > len(self.dataset):
            raise DataError(
                f"the step at {consumed_samples} consumed samples needs samples up to "
                f"{self.end_of(step)}, but the data set was built with {len(self.dataset)}: "
                "build it for as many samples as the run consumes"
            )
        if self._iterator is None or step != self._expected:
            self._restart(step)
        assert self._iterator is not None
        self._expected = None  # whatever goes wrong below, the next call begins afresh
        loaded = next(self._iterator)
        if isinstance(loaded, TesseraError):
            raise loaded
        self._expected = self.following(step)
        size = self.microbatch_size
        return [
            Batch(
                **{name: tensor[m * size : (m + 1) * size] for name, tensor in loaded.items()},
                first_sample=(m * self.dp_size + self.dp_rank) * size,
            )
            for m in range(num_microbatches)
        ]

    def close(self) -> None:
        """End the background processes. The loader may be used again; it then starts new ones."""
        # torch ends its processes when the last reference to the iterator goes.
        self._expected = self._iterator = self._loader = None

    def end_of(self, step: _Step) -> int:
        """Samples consumed when a step is over."""
        per_microbatch = self.dp_size * self.microbatch_size
        return step.consumed_samples + step.num_microbatches * per_microbatch

    def following(self, step: _Step) -> _Step:
        """The step that is to come after one."""
        end, count = self.end_of(step), step.num_microbatches
        if self.num_microbatches_at is not None:
            count = self.num_microbatches_at(end)
        return _Step(end, count)

    def _restart(self, step: _Step) -> None:
        self._steps.first = step
        if self._loader is None:
            self._loader = DataLoader(
                _RankDataset(self.dataset, self.dp_rank, self.dp_size, self.microbatch_size),
                batch_size=None,  # an item is a whole step already
                sampler=self._steps,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                prefetch_factor=self.prefetch if self.num_workers else None,
                persistent_workers=self.num_workers > 0,
                worker_init_fn=_ignore_signals,
                generator=torch.Generator(),  # else it would draw from the global one
            )
        self._iterator = iter(self._loader)


class _UpcomingSteps(Sampler[_Step]):
    """The steps to load, from `first` to the end of the data set."""

    def __init__(self, loader: BatchLoader) -> None:
        self._loader = loader
        self.first = _Step(0, 0)

    def __iter__(self) -> Iterator[_Step]:
        step = self.first
        while self._loader.end_of(step) <= len(self._loader.dataset):
            yield step
            step = self._loader.following(step)


@dataclass(frozen=True)
class _RankDataset(Dataset[Any]):
    """Maps a step to all of this rank's samples in it, microbatch after microbatch."""

    dataset: SampleDataset
    dp_rank: int
    dp_size: int
    microbatch_size: int

    def __getitem__(self, step: _Step) -> dict[str, torch.Tensor] | TesseraError:
        size = self.microbatch_size
        try:
            samples = [
                self.dataset[step.consumed_samples + (m * self.dp_size + self.dp_rank) * size + i]
                for m in range(step.num_microbatches)
                for i in range(size)
            ]
        except TesseraError as error:
            return error  # raised by `fetch`: torch would wrap it in the worker's traceback
        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        if "cu_seqlens" in columns:
            columns["cu_seqlens"] = same_length(columns["cu_seqlens"])
        return {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}


def same_length(bounds: Sequence[Array]) -> list[Array]:
    """Repeat the last bound of every sample until all have as many, a power of two and one more."""
    documents = max(len(one) for one in bounds) - 1
    length = (1 << (documents - 1).bit_length()) + 1
    return [np.pad(one, (0, length - len(one)), mode="edge") for one in bounds]


def _ignore_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the training process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
