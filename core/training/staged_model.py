"""A model over the stages of a pipeline, as the training loop sees it: microbatches in, sums of
losses out. One stage is a pipeline too.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from core.config.run import RunConfig
from core.data_parallel.modes import make_data_parallel, model_placement
from core.parallel.collectives import all_gather_objects
from core.parallel.context import ParallelContext
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters, tie_chunks
from core.parallel.sharing import publish_sharing
from core.pipeline.chosen import chosen_layout
from core.pipeline.executor import Executor, Watch
from core.pipeline.p2p import Payload, Wires
from core.pipeline.schedules import Schedule, make_schedule
from core.training.step_trace import StepTrace
from core.training.task import LossOutput, TrainTask


class StagedModel:
    """The pieces of the model on this rank, and passes through the pieces of all stages."""

    def __init__(
        self, task: TrainTask, config: RunConfig[Any], ctx: ParallelContext, dtype: torch.dtype
    ) -> None:
        """Cut the model, build this rank's pieces and connect the stages.

        Collective over the world: see `publish_sharing` and `Wires.connect`.

        Args:
            task: builds the pieces.
            config: layout, schedule, data parallelism, size of a microbatch.
            ctx: the process axes.
            dtype: format of the computation.

        Raises:
            ConfigError: the model cannot be cut so.
        """
        self._task, self._ctx, self._parallel = task, ctx, config.parallel
        train = config.train
        microbatches = train.global_batch_size // (train.micro_batch_size * ctx.dp.size)
        self.layout = chosen_layout(task.parts(config.data), config.parallel, microbatches)
        where, bounds = self.layout.stage_map, self.layout.bounds
        place = model_placement(ctx, config.parallel, dtype)
        pieces = [where.piece(ctx.pp.rank, chunk) for chunk in range(where.chunks)]
        self.chunks: tuple[nn.Module, ...] = tuple(
            task.build_model(replace(place, parts=range(bounds[piece], bounds[piece + 1])))
            for piece in pieces
        )
        tie_chunks(self.chunks)
        self.sharing = publish_sharing(declared_parameters(*self.chunks), ctx)
        self.data_parallel = make_data_parallel(self.chunks, ctx, config.parallel, dtype)
        self.loss_stage = where.stage(where.pieces - 1)
        shapes: list[Mapping[str, tuple[int, ...]]] = [{}]
        shapes += [
            task.payload(ctx, config.data, config.train.micro_batch_size, bounds[piece])
            for piece in range(1, where.pieces)
        ]
        self._wires = Wires.connect(where, ctx, shapes, dtype)
        self.waiting = self._wires.waiting
        """What this stage waits for."""
        self.schedule = cache(self._make_schedule)
        """The schedule of a training step, by its number of microbatches."""
        self._metrics: tuple[str, ...] | None = None

    def train(
        self,
        batches: Sequence[Any],
        weights: Mapping[str, Tensor],
        seed: int,
        step: int,
        trace: StepTrace | None = None,
    ) -> dict[str, Tensor]:
        """Forward and backward passes of all microbatches of a step.

        Args:
            batches: on the host, the same on all stages.
            weights: for each loss, what its sum is multiplied by before the backward pass.
            seed: of dropout.
            step: likewise.
            trace: measures when each action ran.

        Returns:
            0-dim tensors of the same names on all ranks: `loss/NAME`, the sum over this rank's
            microbatches, and `metric/NAME`, which adds up over dp to the mean. They are right on
            the stage that computes the loss and zero elsewhere.
        """
        self.data_parallel.begin_step(len(batches))
        keys = [DropoutKey(seed, step, batch.first_sample) for batch in batches]
        sums = _Sums(tuple(weights), self._ctx.device)
        schedule = self.schedule(len(batches))
        watch: Watch = nullcontext if trace is None else trace.watch
        self._run(schedule, batches, keys, sums, weights, watch)
        if self._metrics is None:
            # What the loss stage has, on all of them.
            names = all_gather_objects(sums.metric_names, self._ctx.pp)
            self._metrics = names[self.loss_stage]
        return sums.scalars(self._metrics, len(batches) * self._ctx.dp.size)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any], names: Sequence[str]) -> dict[str, Tensor]:
        """Forward passes alone; the sums of losses, as `train` returns them."""
        schedule = self.schedule(len(batches)).forward_only()
        sums = _Sums(tuple(names), self._ctx.device)
        for chunk in self.chunks:
            chunk.eval()
        self._run(schedule, batches, [None] * len(batches), sums, dict.fromkeys(names, 1.0))
        for chunk in self.chunks:
            chunk.train()
        return sums.scalars((), 1)

    def _run(
        self,
        schedule: Schedule,
        batches: Sequence[Any],
        keys: Sequence[DropoutKey | None],
        sums: "_Sums",
        weights: Mapping[str, Tensor | float],
        watch: Watch = nullcontext,
    ) -> None:
        def forward(chunk: int, microbatch: int, received: Payload) -> Payload | Tensor:
            batch, key = batches[microbatch].to(self._ctx.device), keys[microbatch]
            output = self._task.forward_step(self.chunks[chunk], batch, key, received)
            if not isinstance(output, LossOutput):
                return output
            sums.add(output)
            return torch.stack([output.losses[n] * weight for n, weight in weights.items()]).sum()

        Executor(schedule, self._wires, self.data_parallel.deferred, watch).run(forward)

    def _make_schedule(self, microbatches: int) -> Schedule:
        where = self.layout.stage_map
        return make_schedule(
            self._parallel.schedule,
            stages=where.stages,
            microbatches=microbatches,
            chunks=where.chunks,
            trainable=self.layout.trainable,
        )


class _Sums:
    """Running sums over the microbatches of a step, on the device."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._losses = dict.fromkeys(names, self._zero)
        self._metrics: dict[str, Tensor] = {}

    def add(self, output: LossOutput) -> None:
        """Add one microbatch."""
        if set(output.losses) != set(self._losses):
            raise ValueError(
                f"forward_step gave the losses {sorted(output.losses)}, but count those of "
                f"{sorted(self._losses)}"
            )
        for sums, values in ((self._losses, output.losses), (self._metrics, output.metrics)):
            for name, value in values.items():
                sums[name] = sums.get(name, self._zero) + value.detach().double()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Of what has been added."""
        return tuple(self._metrics)

    def scalars(self, metrics: tuple[str, ...], microbatches: int) -> dict[str, Tensor]:
        """Sums of losses; metrics so that they add up to their mean over this many."""
        losses = {f"loss/{name}": value for name, value in self._losses.items()}
        means = {
            f"metric/{name}": self._metrics.get(name, self._zero) / microbatches for name in metrics
        }
        return {**losses, **means}
