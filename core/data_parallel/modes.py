"""Which way of data parallelism a configuration asks for."""

from torch import nn

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.regions import DataParallel
from core.parallel.context import ParallelContext
from core.parallel.sharding import declared_parameters


def make_data_parallel(
    model: nn.Module, ctx: ParallelContext, config: ParallelConfig
) -> DataParallel:
    """Set a model up for data-parallel training; its parameters move to other storage.

    Args:
        model: just built; its sharing groups must have been published.
        ctx: the process axes.
        config: the mode, and its options.
    """
    return GradBuffers(
        declared_parameters(model),
        ctx,
        config.bucket_mib,
        sharded=config.data_parallel == "zero1",
        overlap_reduce=config.overlap_grad_reduce,
        overlap_gather=config.overlap_param_gather,
    )
