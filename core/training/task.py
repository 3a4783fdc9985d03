"""All that a model contributes to training. The loop in `trainer.py` knows no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from core.config.data import DataConfig
from core.data.samples import SampleDataset
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey
from core.parallel.sharding import DeclaredParameter
from core.pipeline.costs import Part


@dataclass(frozen=True)
class LossOutput:
    """What one microbatch gives."""

    losses: Mapping[str, Tensor]
    """Name to the *sum* over this rank's valid tokens, a differentiable scalar in at least fp32.
    The trainer divides by the step's global count of the same name (`TrainTask.count`) and adds
    the quotients up."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Detached scalars that are only reported, as their mean over microbatches and dp."""


class TrainTask(Protocol):
    """One model family with one architecture, as the training loop sees it."""

    @property
    def model_config(self) -> Any:
        """The frozen dataclass that describes the architecture; stored in checkpoints and compared
        on load.
        """

    @property
    def family(self) -> str:
        """Name of the model folder."""

    def validate(self, ctx: ParallelContext, data: DataConfig) -> None:
        """Check that the architecture fits the layout and the data.

        Raises:
            ConfigError: it does not.
        """

    def parts(self, data: DataConfig) -> Sequence[Part]:
        """What pipeline stages are composed of, in the order in which data passes it."""

    def payload(
        self, ctx: ParallelContext, data: DataConfig, micro_batch_size: int, part: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the tensors that this part gets from the one before it, if a stage
        begins with it. They have the format of the computation.
        """

    def build_model(self, place: Placement) -> nn.Module:
        """The parts of the model that `place` holds, with parameters made by `declare_parameter`,
        not yet initialised.
        """

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """Model FLOPs of one token's forward and backward."""

    def describe(self, ctx: ParallelContext, data: DataConfig, dtype: torch.dtype) -> list[str]:
        """Lines for the start of the log, such as which kernels will run."""

    def make_datasets(
        self, data: DataConfig, tokenizer: Any, num_samples: Sequence[int], seed: int
    ) -> Sequence[SampleDataset | None]:
        """Training, validation and test data with at least these numbers of samples; None where the
        number is 0. Called before there is a process group.
        """

    def count(self, batch: Any) -> dict[str, int]:
        """Valid tokens for every loss, from the batch on the host."""

    def forward_step(
        self, chunk: nn.Module, batch: Any, key: DropoutKey | None, received: Mapping[str, Tensor]
    ) -> LossOutput | Mapping[str, Tensor]:
        """One microbatch, already on the device, through one piece of the model.

        Args:
            chunk: as `build_model` made it.
            batch: the same for all pieces.
            key: makes dropout masks; None in evaluation.
            received: what the piece before has given; nothing in the first.

        Returns:
            In the last piece the losses, otherwise what the next piece needs (`payload`).
        """

    def import_weights(
        self, source: Path, parameters: Mapping[str, DeclaredParameter]
    ) -> Mapping[str, Any]:
        """Fill the parameters from a Hugging Face folder (`--init-from`), reading only this rank's
        boxes.

        Returns:
            What a checkpoint should remember of the source, such as its config.json; `assets`, if
            given, is a folder whose tokenizer and other small files go into every checkpoint.
        """
