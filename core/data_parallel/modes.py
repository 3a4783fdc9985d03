"""Which way of data parallelism a configuration asks for."""

from collections.abc import Sequence

import torch
from torch import nn

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.regions import DataParallel
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters


def model_placement(ctx: ParallelContext, config: ParallelConfig, dtype: torch.dtype) -> Placement:
    """Where and in which format a model is to be built that `make_data_parallel` is given.

    Args:
        ctx: the process axes.
        config: the mode.
        dtype: format of the computation.
    """
    if _is_fully_sharded(ctx, config):
        return Placement(ctx, torch.promote_types(dtype, torch.float32), torch.device("meta"))
    return Placement(ctx, dtype, ctx.device)


def make_data_parallel(
    chunks: Sequence[nn.Module],
    ctx: ParallelContext,
    config: ParallelConfig,
    dtype: torch.dtype | None = None,
) -> DataParallel:
    """Set a model up for data-parallel training; its parameters move to other storage.

    Args:
        chunks: the pieces of the model on this rank, in the model's order, just built; their
            sharing groups must have been published.
        ctx: the process axes.
        config: the mode, and its options.
        dtype: format of the computation; by default that of the parameters.
    """
    if _is_fully_sharded(ctx, config):
        from core.data_parallel.fsdp import FullyShardedModel  # torch takes a second to load it

        (model,) = chunks
        first = next(model.parameters())
        return FullyShardedModel(model, ctx, dtype or first.dtype)
    return GradBuffers(
        declared_parameters(*chunks),
        ctx,
        config.bucket_mib,
        sharded=config.data_parallel == "zero1",
        overlap_reduce=config.overlap_grad_reduce,
        overlap_gather=config.overlap_param_gather,
    )


def _is_fully_sharded(ctx: ParallelContext, config: ParallelConfig) -> bool:
    """With one data-parallel rank there is nothing to share out, as under ZeRO-1."""
    return config.data_parallel == "fsdp2" and ctx.dp.size > 1
