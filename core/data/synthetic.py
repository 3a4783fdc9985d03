"""Random tokens, for benchmarks and for tests of a layout: no file is read."""

from dataclasses import dataclass

import numpy as np

from core.data.samples import Sample, check_index, next_token_sample


@dataclass(frozen=True, kw_only=True)
class SyntheticDataset:
    """Uniform random tokens, each sample a function of (seed, stream, index) alone."""

    num_samples: int
    seq_length: int
    vocab_size: int
    seed: int
    stream: int = 0
    """Sets of the same seed differ by it: 0 train, 1 valid, 2 test."""

    def __len__(self) -> int:
        return self.num_samples

    @property
    def order(self) -> dict[str, object]:
        """What samples follow from, beside the seed."""
        return {"sequence length": self.seq_length, "vocabulary": self.vocab_size}

    def __getitem__(self, index: int) -> Sample:
        """`tokens` [s], `labels` [s] int64 and `loss_mask` [s] bool, all true."""
        check_index(index, len(self))
        rng = np.random.default_rng((self.seed, self.stream, index))
        return next_token_sample(rng.integers(self.vocab_size, size=self.seq_length + 1))
