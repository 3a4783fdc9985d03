"""What a person wants to know before the first step."""

from collections.abc import Iterator
from typing import Any

import torch

from core.config.run import RunConfig
from core.parallel.context import ParallelContext
from core.training.staged_model import StagedModel
from core.training.task import TrainTask


def describe_run(
    task: TrainTask,
    config: RunConfig[Any],
    ctx: ParallelContext,
    model: StagedModel,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Lines for the start of the log: model, processes, layout, batches, and what the task says."""
    train = config.train
    yield f"{task.family}: {model.sharing.elements:,} parameters in {config.precision.dtype}"
    sequence = ", sequence parallel" if ctx.sequence_parallel else ""
    yield (
        f"{ctx.world.size} processes on {ctx.device.type}: tp {ctx.tp.size}{sequence}, "
        f"pp {ctx.pp.size}, dp {ctx.dp.size}"
    )
    if ctx.pp.size > 1:
        yield f"schedule {config.parallel.schedule}, layout {model.layout}"
        yield model.layout.table()
    microbatches = train.global_batch_size // (train.micro_batch_size * ctx.dp.size)
    yield (
        f"global batch {train.global_batch_size}: {microbatches} microbatches of "
        f"{train.micro_batch_size} x {config.data.seq_length} tokens per rank"
    )
    yield from task.describe(ctx, config.data, dtype)
