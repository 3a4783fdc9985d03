"""The smallest thing that the training loop can train: an embedding and a linear layer, on made-up
sequences. Lets tests of the loop run in milliseconds and see every number.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.data.loader import Batch
from core.data.samples import Sample, next_token_sample
from core.layers.dropout import Dropout
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey, normal_init
from core.parallel.sharding import Declaration, DeclaredParameter, declare_parameter
from core.pipeline.costs import Part, Work
from core.training.task import LossOutput


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the model."""

    vocab_size: int = 11
    """Tokens."""
    hidden_size: int = 8
    """Width."""


@dataclass(frozen=True)
class TinyDataset:
    """Sequences t -> 3 t + 1; sample i counts its first `i % (length + 1)` labels, or all."""

    num_samples: int
    seq_length: int
    vocab_size: int
    uneven: bool
    count_nothing_before: int

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        """One sample."""
        text = np.empty(self.seq_length + 1, dtype=np.int64)
        text[0] = index * 7 % self.vocab_size
        for position in range(self.seq_length):
            text[position + 1] = (3 * text[position] + 1) % self.vocab_size
        sample = next_token_sample(text)
        if self.uneven:
            sample["loss_mask"] = np.arange(self.seq_length) < index % (self.seq_length + 1)
        if index < self.count_nothing_before:
            sample["loss_mask"] = np.zeros(self.seq_length, dtype=np.bool_)
        return sample


class TinyModel(nn.Module):
    """Embedding, dropout, linear layer."""

    def __init__(self, config: TinyConfig, place: Placement) -> None:
        super().__init__()
        self.dropout = Dropout(place.ctx, 0.1, "dropout")
        shape = (config.vocab_size, config.hidden_size)
        self.holds = [name for i, name in enumerate(("embedding", "head")) if place.holds(i)]
        for name in self.holds:
            declaration = Declaration(shape, whole_copy(shape), normal_init(0.3))
            declare_parameter(
                self, name, shape, declaration, dtype=place.dtype, device=place.device
            )

    def forward(
        self, tokens: Tensor, key: DropoutKey | None, hidden: Tensor | None = None
    ) -> Tensor:
        """`[b, s]` to logits `[b, s, v]`, or from or to hidden states `[s, b, h]`."""
        if "embedding" in self.holds:
            hidden = self.dropout(self.get_parameter("embedding")[tokens.t()], key)
        assert hidden is not None
        if "head" not in self.holds:
            return hidden
        return hidden.transpose(0, 1) @ self.get_parameter("head").t()


def _fail() -> None:
    raise RuntimeError("made to fail")


@dataclass
class TinyTask:
    """A `TrainTask` that can be told to misbehave."""

    model_config: TinyConfig = field(default_factory=TinyConfig)
    uneven: bool = True
    """Count a different number of labels of each sample."""
    count_nothing_before: int = 0
    """None of the labels of the samples before this one counts."""
    infinite_at: Sequence[int] = ()
    """Steps with an infinite loss."""
    fail_at: tuple[int, int] | None = None
    """Rank and step at which `fail` is called."""
    fail: Callable[[], object] = _fail
    """Ends the run in some way."""
    seconds: float = 0.0
    """Time that a microbatch takes."""
    second_loss: bool = False
    """Add the mean square of the logits at even positions, with a count of its own."""
    family: str = "tiny"
    _rank: int = 0

    def validate(self, ctx: ParallelContext, data: DataConfig) -> None:
        """Everything goes."""
        self._rank = ctx.world.rank

    def parts(self, data: DataConfig) -> Sequence[Part]:
        """Embedding and head."""
        count = self.model_config.vocab_size * self.model_config.hidden_size
        work = Work(1.0, 1.0, 1.0)
        return (
            Part(symbol="E", name="embedding", work=work, parameters=count),
            Part(symbol="L", name="head", work=work, parameters=count),
        )

    def payload(
        self, ctx: ParallelContext, data: DataConfig, micro_batch_size: int, part: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Hidden states."""
        return {"hidden": (data.seq_length, micro_batch_size, self.model_config.hidden_size)}

    def build_model(self, place: Placement) -> nn.Module:
        """The model or one of its parts."""
        return TinyModel(self.model_config, place)

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """Those of the linear layer; there is no attention."""
        return 6.0 * self.model_config.vocab_size * self.model_config.hidden_size

    def describe(self, ctx: ParallelContext, data: DataConfig, dtype: torch.dtype) -> list[str]:
        """Nothing to say."""
        return []

    def make_datasets(
        self, data: DataConfig, tokenizer: Any, num_samples: Sequence[int], seed: int
    ) -> tuple[TinyDataset | None, ...]:
        """As many samples as asked for."""
        vocab = self.model_config.vocab_size
        return tuple(
            TinyDataset(number, data.seq_length, vocab, self.uneven, self.count_nothing_before)
            if number
            else None
            for number in num_samples
        )

    def count(self, batch: Batch) -> dict[str, int]:
        """Labels that count."""
        counts = {"lm": int(batch.loss_mask.sum())}
        if self.second_loss:
            counts["square"] = batch.tokens[:, ::2].numel()
        return counts

    def forward_step(
        self, chunk: nn.Module, batch: Batch, key: DropoutKey | None, received: Mapping[str, Tensor]
    ) -> LossOutput | Mapping[str, Tensor]:
        """Cross entropy of labels that count, and the second loss."""
        if key is not None:
            time.sleep(self.seconds)
            if self.fail_at == (self._rank, key.step):
                self.fail()
        logits = chunk(batch.tokens, key, received.get("hidden"))
        assert isinstance(chunk, TinyModel)
        if "head" not in chunk.holds:
            return {"hidden": logits}
        losses = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        loss = torch.where(batch.loss_mask.flatten(), losses, 0.0).sum()
        if key is not None and key.step in self.infinite_at:
            loss = loss * float("inf")
        found = {"lm": loss}
        if self.second_loss:
            found["square"] = logits[:, ::2].square().mean(-1).sum()
        return LossOutput(found, {"logit_max": logits.detach().max()})

    def import_weights(
        self, source: Path, parameters: Mapping[str, DeclaredParameter]
    ) -> Mapping[str, Any]:
        """Ones, as no weights are."""
        for declared in parameters.values():
            declared.local.fill_(1.0)
        return {"config": {"architectures": ["Tiny"]}, "assets": str(source)}


def tiny_run(
    *, save: Path | None = None, dp: int = 1, init_from: Path | None = None, **train: Any
) -> RunConfig[TinyConfig]:
    """An fp64 run of 6 steps of 8 samples; `train` replaces fields of `TrainConfig`."""
    options: dict[str, Any] = {"steps": 6, "global_batch_size": 8, "gc_interval": 0, **train}
    return RunConfig(
        model=TinyConfig(),
        save=None if save is None else str(save),
        init_from=None if init_from is None else str(init_from),
        device="cpu",
        parallel=ParallelConfig(dp=dp),
        precision=PrecisionConfig(dtype="fp64"),
        optimizer=OptimizerConfig(lr=0.05),
        data=DataConfig(synthetic=True, seq_length=6, num_workers=0),
        train=TrainConfig(**options),
    )
