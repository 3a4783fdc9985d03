"""The layout that a configuration asks for, without torch, so that it is checked before a process
starts.
"""

from collections.abc import Sequence

from core.config.parallel import ParallelConfig
from core.errors import about
from core.pipeline.costs import Part
from core.pipeline.fastest import fastest
from core.pipeline.layout import Layout, balanced, parse_layout
from core.pipeline.schedules import stage_map_for


def first_layout(parts: Sequence[Part], config: ParallelConfig) -> Layout:
    """Cut a model as `--parallel` says; without a layout string, balanced by cost.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    with about(f"--parallel.virtual-stages {config.virtual_stages}"):
        where = stage_map_for(config.schedule, config.pp, config.virtual_stages)
    if config.layout is not None:
        with about("--parallel.layout"):
            return parse_layout(config.layout, parts, where)
    with about(f"--parallel.pp {config.pp}"):
        return balanced(parts, where)


def chosen_layout(parts: Sequence[Part], config: ParallelConfig, microbatches: int) -> Layout:
    """`first_layout`; without a layout string, the one near it whose simulated step of so many
    microbatches (at least one) is the shortest.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    layout = first_layout(parts, config)
    if config.layout is not None:
        return layout
    return fastest(layout, config.schedule, max(1, microbatches))
