"""When each action of a training step ran, measured on all pipeline stages."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from core.parallel.collectives import all_gather_objects
from core.parallel.context import ParallelContext
from core.pipeline.schedules import Action
from core.pipeline.simulate import Timed, Timeline
from core.training.exchange import DeviceMark

TRACE_FILE = "pipeline_trace.json"
"""Where `--train.trace-step` leaves it in --save; the format is in `core/pipeline/trace.py`."""


class StepTrace:
    """Marks on the device's own timeline around every action of one step."""

    def __init__(self, ctx: ParallelContext) -> None:
        """Start the clock. Collective over pp: one all-reduce, which all stages leave at nearly the
        same moment; there their clocks begin.
        """
        self._ctx = ctx
        if ctx.pp.group is not None:
            dist.all_reduce(torch.zeros(1, device=ctx.device), group=ctx.pp.group)
        self._begin = DeviceMark(ctx.device)
        self._marks: list[tuple[Action, DeviceMark, DeviceMark]] = []

    @contextmanager
    def watch(self, action: Action) -> Iterator[None]:
        """Mark when an action begins and ends; the host does not wait."""
        begin = DeviceMark(self._ctx.device)
        yield
        self._marks.append((action, begin, DeviceMark(self._ctx.device)))

    def timeline(self) -> Timeline:
        """The actions of all stages, in milliseconds, on every rank. Waits for the device;
        collective over pp.
        """
        entries = []
        for action, begin, end in self._marks:
            end.wait()
            begin.wait()
            times = (1e3 * mark.seconds_since(self._begin) for mark in (begin, end))
            entries.append(Timed(action, *times))
        return tuple(all_gather_objects(tuple(entries), self._ctx.pp))
