"""This project's step, as `train_step.py` has it: made of the parts that the trainer uses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.contestants.registry import with_option
from benchmarks.train_step import Step, Work
from benchmarks.workloads import Workload
from core.config.precision import PrecisionConfig, validate_precision
from core.config.transformer import TransformerConfig
from core.parallel.context import ParallelContext


class Ours:
    """Ours, with a backend and a precision."""

    def __init__(
        self,
        work: Workload,
        config: TransformerConfig,
        device: torch.device,
        options: Mapping[str, str],
    ) -> None:
        """Build and initialise.

        Args:
            work: shapes.
            config: architecture.
            device: where to run.
            options: `backend` and `fp8`, as in `--backend` and `--precision.fp8`; left out
                where they have their defaults.

        Raises:
            ConfigError: this version lacks one of the options.
        """
        precision = PrecisionConfig(
            master_weights="remainder" if work.memory_lean else "full",
            moments="bf16" if work.memory_lean else "fp32",
        )
        if "fp8" in options:
            precision = with_option(precision, "fp8", options["fp8"])
        validate_precision(precision)
        settings = Work(
            preset=work.preset,
            layers=work.layers,
            seq_length=work.seq_length,
            micro_batch_size=work.micro_batch_size,
            microbatches=work.microbatches,
            precision=precision,
        )
        if "backend" in options:
            settings = with_option(settings, "backend", options["backend"])
        self._step = Step(settings, config, ParallelContext.single(device))

    def step(self) -> Tensor:
        """Run the next step; returns its mean loss."""
        return self._step()

    def token_losses(self) -> Tensor:
        """Losses of the first microbatch."""
        tokens = self._step.tokens(0)
        losses: Tensor = self._step.model(tokens[:, :-1], tokens[:, 1:], None)
        return losses.detach()
