"""What all ranks tell each other in a step: one small all-reduce, and a look at its outcome a step
later, so that the host never waits for the device.
"""

import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from core.parallel.context import ParallelContext


class Exchange:
    """Sums a stop flag, counts that the host knows and scalars on the device over all ranks.

    Every rank of a replica sees the same samples, so one of them speaks for it; the flag is
    anyone's.
    """

    def __init__(self, ctx: ParallelContext, loss_stage: int) -> None:
        """`loss_stage`: the pipeline stage that computes the loss."""
        self._group, self._device = ctx.world.group, ctx.device
        # The loss is alike on all tensor-parallel ranks of its stage.
        self._speaks = ctx.tp.rank == 0 and ctx.pp.rank == loss_stage

    def sum(self, stop: bool, counts: Sequence[int], scalars: Sequence[Tensor] = ()) -> Tensor:
        """Sum over the world; collective, one all-reduce. On CUDA the host does not wait.

        Returns:
            fp64 on the device: the number of ranks that want to stop, the counts, the scalars.
        """
        own = counts if self._speaks else [0] * len(counts)
        values = host_tensor([float(stop), *own], self._device)
        if scalars:
            stacked = torch.stack([scalar.detach().double() for scalar in scalars])
            # Not a product: a loss may be infinite.
            values = torch.cat([values, stacked if self._speaks else torch.zeros_like(stacked)])
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        return values


def host_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    """fp64 numbers of the host on the device, copied without waiting for it."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(
        device, non_blocking=True
    )


class DeviceMark:
    """A moment on the device's own timeline. The host's clock would not do: it may queue a whole
    step after the device has finished one, and only then look.
    """

    def __init__(self, device: torch.device) -> None:
        """Mark the end of what has been queued so far; the host does not wait."""
        self._host = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        """Wait until the device has come that far."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "DeviceMark") -> float:
        """Time from one mark to this one, which must have been waited for."""
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        return earlier._event.elapsed_time(self._event) / 1e3


class LateValues:
    """Named device scalars on their way to the host."""

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        """Start the copy; it does not wait for the values to be computed."""
        self._names = tuple(scalars)
        values = torch.stack([scalar.detach().double() for scalar in scalars.values()])
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
        self.mark = DeviceMark(values.device)
        """When the device came that far."""

    def wait(self) -> dict[str, float]:
        """The values, once the device has come that far."""
        self.mark.wait()
        return dict(zip(self._names, self._host.tolist(), strict=True))
