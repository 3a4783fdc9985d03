"""What data-parallel ranks exchange of their buckets of parameters and gradients.

A bucket's reduction starts, under the rest of the backward pass, once every parameter in it has
*said* that its gradient is complete (`grad_ready`). Autograd hooks could not say so: a weight
gradient may be computed long after autograd has passed the layer.

Under ZeRO-1 (Rajbhandari et al., 2020) the reduction leaves each rank its part of the sum; it
updates that part of the parameters, and an all-gather, under the next forward pass, brings back the
others'. Replicated, every rank gets the whole sum and updates everything.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from core.data_parallel.buckets import Bucket, Slot, make_bucket, plan_buckets
from core.data_parallel.deferred import DeferredProducts
from core.data_parallel.derived import StepCache
from core.data_parallel.fragments import cut_fragments
from core.data_parallel.main_grad import expire, settle
from core.data_parallel.regions import Fragment, Region
from core.parallel.collectives import (
    start_all_gather_in_place,
    start_all_reduce,
    start_reduce_scatter_in_place,
)
from core.parallel.context import ParallelContext
from core.parallel.sharding import DeclaredParameter


class GradBuffers:
    """`DataParallel` by buckets over all trainable parameters of a model, in reverse order of
    declaration, which is nearly the order in which the backward pass completes them.

    On every trainable parameter it sets `main_grad`, a view that gradients are accumulated into,
    and `grad_ready`, called without arguments each time a whole gradient has been added. The first
    step counts those calls; later steps start a bucket once each of its parameters has been ready
    that often for each microbatch of the step, in whatever order the gradients come. A parameter
    with an ordinary gradient needs no call: a hook adds the gradient to `main_grad`, drops `.grad`
    and calls `grad_ready`. The parameters' `deferred` lets a pipeline put products that make weight
    gradients off, and `derived` keeps what layers make of them during a step.

    Updated parameters are awaited by the forward pass of the module that owns them, so a parameter
    must not be read by another module before that.
    """

    def __init__(
        self,
        parameters: dict[str, DeclaredParameter],
        ctx: ParallelContext,
        bucket_mib: int,
        *,
        sharded: bool = True,
        overlap_reduce: bool = True,
        overlap_gather: bool = True,
    ) -> None:
        """Move the parameters into flat storage, keeping their bits.

        Args:
            parameters: all parameters of the model, by global name, in module order. Those that
                require no gradient are left alone.
            ctx: the process axes; gradients are summed over dp.
            bucket_mib: size of a bucket in MiB of fp32. A larger parameter has its own bucket.
            sharded: ZeRO-1 over dp; otherwise every rank updates everything.
            overlap_reduce: whether a reduction may start before the backward pass has ended.
            overlap_gather: whether a gather may end after the next forward pass has begun.

        Raises:
            ValueError: a parameter already lies in the buffers of another instance.
        """
        self.parameters = parameters
        self._axis = ctx.dp
        self._overlap_reduce, self._overlap_gather = overlap_reduce, overlap_gather
        self._sharded = sharded and ctx.dp.size > 1
        trainable = {n: p for n, p in parameters.items() if p.parameter.requires_grad}
        for name, declared in trainable.items():
            if hasattr(declared.parameter, "main_grad"):
                raise ValueError(f"{name} already has a gradient buffer")
        self.deferred = DeferredProducts()
        """Where all parameters' products go that are put off."""
        self._derived = StepCache()
        order = {name: position for position, name in enumerate(trainable)}
        plan = plan_buckets(trainable, (bucket_mib << 20) // 4)
        # A bucket is complete when its earliest declared parameter is.
        plan.sort(key=lambda names: -order[names[-1]])
        self.buckets = tuple(
            make_bucket([trainable[n] for n in names], ctx.dp.size) for names in plan
        )
        """In the order in which their reductions start, which is the same on all ranks."""
        # The bucket that is complete last is used first.
        self.regions: Sequence[Region] = tuple(map(self._region, reversed(self.buckets)))
        self.counted = ctx.world if self._sharded else ctx.model
        self._bucket_of = tuple(i for i, b in enumerate(self.buckets) for _ in b.slots)
        self._parameters = [trainable[s.sharding.name].parameter for _, s in self.slots()]
        self._gathers: list[dist.Work | None] = [None] * len(self.buckets)
        owners: dict[nn.Module, set[int]] = defaultdict(set)
        for index, (bucket, slot) in enumerate(self.slots()):
            declared = trainable[slot.sharding.name]
            parameter: Any = declared.parameter
            parameter.main_grad = slot.view(bucket.main_grad)
            parameter.deferred = self.deferred
            parameter.derived = self._derived
            parameter.grad_ready = self._readiness(index, slot.sharding.name)
            parameter.register_post_accumulate_grad_hook(_accumulate)
            for module in declared.modules:
                owners[module].add(self._bucket_of[index])
        if self._sharded:
            for module, needed in owners.items():
                module.register_forward_pre_hook(self._awaiter(tuple(sorted(needed))))
        self._per_microbatch: list[int] | None = None
        self._reset()

    def begin_step(self, microbatches: int) -> None:
        """Say that a step starts, and of how many microbatches."""
        if microbatches:
            self._derived.open()
        self._microbatches = microbatches
        self._calls = [0] * len(self._bucket_of)
        known = self._per_microbatch or self._calls
        self._expected = [count * microbatches for count in known]
        self._incomplete = [0] * len(self.buckets)
        for bucket, expected in zip(self._bucket_of, self._expected, strict=True):
            # 0: it has no gradient. Less: it is not known when it will have all, so that the
            # reduction waits for the end of the step.
            self._incomplete[bucket] += expected != 0

    def finish(self) -> None:
        """Start the reductions that have not started and make the current stream wait for all.

        Afterwards the `main_grad` of every region holds the sum over dp. Collective over dp: one
        reduce-scatter (replicated: all-reduce) per bucket, in the same order on all ranks. On CUDA
        the host does not wait.
        """
        self._derived.close()
        # A gather that no module has awaited must not meet the update that comes next.
        self.wait_for_parameters()
        while self._started < len(self.buckets):
            self._start_next()
        for work in self._works:
            work.wait()
        self._works.clear()
        if self._per_microbatch is None and self._microbatches:
            self._per_microbatch = [
                -1 if count % self._microbatches else count // self._microbatches
                for count in self._calls
            ]

    def publish(self, index: int) -> None:
        """Start to gather the values of a region from all ranks; collective over dp under ZeRO-1,
        one all-gather, which the forward pass of the parameters' modules awaits.
        """
        if not self._sharded:
            return
        at = len(self.buckets) - 1 - index
        work = start_all_gather_in_place(self.buckets[at].values, self._axis)
        self._gathers[at] = work
        if not self._overlap_gather:
            self._wait(at)

    def zero(self) -> None:
        """Expire all gradients; see `main_grad.py`. The gaps between them are zero for good."""
        for parameter in self._parameters:
            expire(parameter)
        self._reset()

    def wait_for_parameters(self) -> None:
        """Make the current stream wait until all parameters are whole."""
        for bucket in range(len(self.buckets)):
            self._wait(bucket)

    def slots(self) -> Iterator[tuple[Bucket, Slot]]:
        """Every trainable parameter with its bucket."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                yield bucket, slot

    def _mine(self, bucket: Bucket) -> slice:
        """The part of a bucket that this rank updates."""
        if not self._sharded:
            return slice(0, len(bucket.values))
        size = len(bucket.values) // self._axis.size
        return slice(self._axis.rank * size, (self._axis.rank + 1) * size)

    def _region(self, bucket: Bucket) -> Region:
        mine = self._mine(bucket)
        fragments: list[Fragment] = []
        for slot in bucket.slots:
            first = max(mine.start - slot.start, 0)
            stop = min(mine.stop - slot.start, slot.numel)
            if first < stop:
                start = slot.start + first - mine.start
                fragments += cut_fragments(slot.sharding, slot.shape, first, stop, start)
        return Region(
            bucket.values[mine], bucket.main_grad[mine], tuple(fragments), bucket.weight_decay
        )

    def _reset(self) -> None:
        self._started = 0
        self._works: list[dist.Work] = []
        self.begin_step(0)

    def _awaiter(self, buckets: tuple[int, ...]) -> Callable[..., None]:
        def await_parameters(*_: Any) -> None:
            for bucket in buckets:
                self._wait(bucket)

        return await_parameters

    def _wait(self, bucket: int) -> None:
        work, self._gathers[bucket] = self._gathers[bucket], None
        if work is not None:
            work.wait()

    def _readiness(self, index: int, name: str) -> Callable[[], None]:
        """The `grad_ready` of a parameter. On CUDA its gradient must be complete on the stream that
        is current at the call, since that is the stream a reduction waits for.
        """
        bucket = self._bucket_of[index]

        def grad_ready() -> None:
            if bucket < self._started:
                raise RuntimeError(
                    f"{name}: a gradient arrived after the reduction of its bucket "
                    "had started; it was used more often than in the first step, or after finish()"
                )
            self._calls[index] += 1
            if (
                self._overlap_reduce
                and self._per_microbatch is not None
                and self._calls[index] == self._expected[index]
            ):
                self._incomplete[bucket] -= 1
                # Strictly in order: ranks must start the same collectives in the same order, even
                # where one of them leaves a parameter unused.
                while self._started < len(self.buckets) and not self._incomplete[self._started]:
                    self._start_next()

        return grad_ready

    def _start_next(self) -> None:
        for parameter, bucket in zip(self._parameters, self._bucket_of, strict=True):
            if bucket == self._started:
                settle(parameter)
        main_grad = self.buckets[self._started].main_grad
        start = start_reduce_scatter_in_place if self._sharded else start_all_reduce
        work = start(main_grad, self._axis)
        if work is not None:
            self._works.append(work)
        self._started += 1


def _accumulate(parameter: Any) -> None:
    """Move an ordinary gradient to `main_grad`."""
    if parameter.grad is None:  # autograd calls this too where every use accumulated by itself
        return
    settle(parameter)
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
    parameter.grad_ready()
