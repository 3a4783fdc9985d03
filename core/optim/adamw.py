"""AdamW over flat regions, one pass over memory per step (Kingma & Ba, 2015; Loshchilov & Hutter,
2019), with everything that varies from step to step on the device.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.regions import ALIGNMENT, Fragment, Region
from core.kernels.compile import compiled, upcast
from core.optim.rounding import join_master, round_master, round_stochastic, split_master
from core.parallel.random import make_key, philox
from core.parallel.sharding import BoxCopy

StateName = Literal["master", "master_remainder", "exp_avg", "exp_avg_sq"]

_CPU_ELEMENTS = 256 * ALIGNMENT
"""Elements updated at a time on a CPU: all operands of a chunk stay in the second-level cache."""


@dataclass(frozen=True)
class ParameterState:
    """One piece of optimizer state of one parameter, or of a part of it."""

    name: StateName
    fragment: Fragment
    tensor: Tensor
    """A view into the state, shaped like the fragment."""


@dataclass(frozen=True)
class _RegionState:
    region: Region
    master: Tensor
    """The region's own values where those are wide enough already; int16 where it is the remainder
    that they lack."""
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def tensors(self) -> dict[StateName, Tensor]:
        """What a checkpoint keeps. A master that is the parameter itself is left out."""
        moments: dict[StateName, Tensor] = {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
        }
        if self.master is self.region.values:
            return moments
        whole = self.master.dtype.is_floating_point
        return {"master" if whole else "master_remainder": self.master, **moments}


class AdamW:
    """Decoupled weight decay Adam, equal to `torch.optim.AdamW` up to rounding.

    By default master weights and moments have the format of `main_grad`. To save memory, a master
    may be kept as the 16 bits that its bf16 parameter lacks (as Transformer Engine's
    `store_param_remainders` does), which changes no bit of the result, and moments may be bf16,
    rounded stochastically. Regions whose parameters declared no weight decay have none.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        device: torch.device,
        config: OptimizerConfig,
        precision: PrecisionConfig,
        seed: int = 0,
    ) -> None:
        """Allocate state for these regions, as if nothing had been trained; `seed` is that of
        stochastic rounding.
        """
        self.step_count = torch.zeros((), dtype=torch.int64, device=device)
        """Applied steps, which the bias corrections follow; a skipped step does not count."""
        self._betas, self._eps = config.betas, config.eps
        remainder = precision.master_weights == "remainder"
        narrow = torch.bfloat16 if precision.moments == "bf16" else None
        self._states = []
        for region in regions:
            values, grad = region.values, region.main_grad
            master = values.to(grad.dtype)  # the same tensor where it is wide
            if remainder and master is not values:
                master = torch.zeros_like(values, dtype=torch.int16)
            exp_avg, exp_avg_sq = (torch.zeros_like(grad, dtype=narrow) for _ in range(2))
            self._states.append(_RegionState(region, master, exp_avg, exp_avg_sq))
        self._rows = [_whole(region) if narrow is None else _by_index(region) for region in regions]
        self._draws = None if narrow is None else _RoundingDraws(self._rows, device, seed)

    @torch.no_grad()
    def step(
        self,
        *,
        lr: float,
        weight_decay: float,
        grad_scale_inverse: Tensor | float,
        clip_coefficient: Tensor | float,
        apply: Tensor,
        updated: Callable[[int], object] = lambda index: None,
    ) -> None:
        """Update all parameters; the host does not wait and no number causes a recompilation.

        Args:
            lr: learning rate.
            weight_decay: weight decay of the parameters that have one.
            grad_scale_inverse: what gradients are multiplied by to undo the loss scale.
            clip_coefficient: what they are multiplied by beside that.
            apply: 0-dim bool. Where it is false, no bit of parameters and state changes, whatever
                the gradients are.
            updated: called with the index of every region after its update has been queued.
        """
        self.step_count.add_(apply)
        count = self.step_count.double()
        beta1, beta2 = self._betas
        step_size = lr / (1.0 - beta1**count)
        scale = torch.ones_like(count) * grad_scale_inverse * clip_coefficient
        constants = [
            torch.full_like(count, x) for x in (1.0 - beta1, beta2, 1.0 - beta2, self._eps)
        ]
        corrected = [scale, step_size, torch.rsqrt(1.0 - beta2**count), *constants]
        if self._draws is not None:
            self._draws.begin_step(self.step_count)
        for index, state in enumerate(self._states):
            decay = 1.0 - lr * weight_decay if state.region.weight_decay else 1.0
            scalars = torch.stack([*corrected, torch.full_like(count, decay)])
            self._update(index, state, scalars.to(state.region.main_grad.dtype), apply)
            updated(index)

    def state_tensors(self) -> Iterator[ParameterState]:
        """All state that a checkpoint keeps, as live views."""
        for state in self._states:
            tensors = state.tensors()
            for fragment in state.region.fragments:
                for name, flat in tensors.items():
                    yield ParameterState(name, fragment, fragment.view(flat))

    def refresh_master_from_parameters(self) -> None:
        """Take over parameters that were loaded without optimizer state."""
        for state in self._states:
            if not state.master.dtype.is_floating_point:
                state.master.zero_()
            elif state.master is not state.region.values:
                state.master.copy_(state.region.values)

    def _update(self, index: int, state: _RegionState, scalars: Tensor, apply: Tensor) -> None:
        region = state.region
        separate = state.master is not region.values
        flats = (region.main_grad, state.master, state.exp_avg, state.exp_avg_sq, region.values)
        for number, rows in enumerate(self._rows[index]):
            matrices = [flat[rows.start : rows.stop].view(rows.shape) for flat in flats]
            place = None if self._draws is None else self._draws.place(index, number)
            height, width = rows.shape
            chunk = height if scalars.is_cuda else max(1, _CPU_ELEMENTS // width)
            for at in range(0, height, chunk):
                grad, master, exp_avg, exp_avg_sq, values = (m[at : at + chunk] for m in matrices)
                if place is not None and at:
                    place = place + place.new_tensor([0, 0, chunk * rows.stride, 0])
                update_(
                    grad,
                    master,
                    exp_avg,
                    exp_avg_sq,
                    values if separate else None,
                    scalars,
                    apply,
                    place,
                )


@dataclass(frozen=True)
class _Rows:
    """Part of a region as a matrix; element `[i, j]` has index `first + i * stride + j` in its
    global tensor.
    """

    start: int
    shape: tuple[int, int]
    name: str = ""
    first: int = 0
    stride: int = 0

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


def _whole(region: Region) -> list[_Rows]:
    """All of a region, whatever the parameters' shapes are."""
    numel = len(region.values)
    width = math.gcd(numel, ALIGNMENT)
    return [_Rows(0, (numel // width, width))]


def _by_index(region: Region) -> list[_Rows]:
    """The elements of a region that belong to a global tensor, as few matrices as they make up."""
    return [
        rows
        for fragment in region.fragments
        for copy in fragment.copies
        for rows in _box_rows(fragment, copy)
    ]


def _box_rows(fragment: Fragment, copy: BoxCopy) -> Iterator[_Rows]:
    local, whole, shape = copy.local, fragment.global_shape, fragment.shape
    # From dim `split` on, the box is one run of elements both in the region and in the global
    # tensor.
    split = len(shape) - 1
    while split > 0 and local.shape[split] == shape[split] == whole[split]:
        split -= 1
    run = math.prod(local.shape[max(split, 0) :])
    # The dimension before it makes rows of these runs where the region has no gaps between them.
    tall = split > 0 and local.shape[split:] == shape[split:]
    outer = local.shape[: split - 1] if tall else local.shape[: max(split, 0)]
    height = local.shape[split - 1] if tall else 1
    for index in itertools.product(*map(range, outer)):
        inside = (*index, *(0,) * (len(shape) - len(index)))
        start = fragment.start + _flat_index(local.start, inside, shape)
        first = _flat_index(copy.global_.start, inside, whole)
        if tall:
            yield _Rows(start, (height, run), fragment.name, first, math.prod(whole[split:]))
        else:
            width = math.gcd(run, ALIGNMENT)
            yield _Rows(start, (run // width, width), fragment.name, first, width)


def _flat_index(start: Sequence[int], inside: Sequence[int], shape: Sequence[int]) -> int:
    """Row-major index of `start + inside` in a tensor."""
    flat = 0
    for a, b, size in zip(start, inside, shape, strict=True):
        flat = flat * size + a + b
    return flat


class _RoundingDraws:
    """Keys and indices for the random bits of stochastic rounding: a hash of (seed, applied step,
    global name, global index), so the same at every layout.
    """

    def __init__(self, rows: Sequence[Sequence[_Rows]], device: torch.device, seed: int) -> None:
        self._offsets = [0, *itertools.accumulate(map(len, rows))]
        flat = [row for region in rows for row in region]
        keys = [make_key(seed, "rounding", row.name) for row in flat]
        table = [
            (key & 0xFFFFFFFF, key >> 32, row.first, row.stride)
            for key, row in zip(keys, flat, strict=True)
        ]
        self._table = torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 4)
        self._now = self._table

    def begin_step(self, step: Tensor) -> None:
        """Take new keys for the step counted by a 0-dim int64 tensor; the host does not wait."""
        low, high = philox((self._table[:, 0], self._table[:, 1]), step)
        self._now = torch.cat([torch.stack([low, high], 1), self._table[:, 2:]], 1)

    def place(self, region: int, number: int) -> Tensor:
        """int64 `[4]` for the rows of this number in a region: two words of a key, `first`,
        `stride`.
        """
        return self._now[self._offsets[region] + number]


@compiled
def update_(
    grad: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor | None,
    scalars: Tensor,
    apply: Tensor,
    place: Tensor | None,
) -> None:
    """Update `[n, w]` tensors in place.

    Args:
        grad: read only.
        master: parameters in the format of the computation, or int16 remainders of `values`.
        exp_avg: first moment.
        exp_avg_sq: second moment.
        values: parameters in the model's own format, rounded from `master`; None where they are
            `master`.
        scalars: `[8]`: gradient scale, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), 1 - beta1, beta2,
            1 - beta2, eps, 1 - lr * weight decay.
        apply: 0-dim bool.
        place: int64 `[4]`, two words of a key, index of element `[0, 0]` in its global tensor and
            distance of rows there; for moments narrower than `grad`, which are rounded
            stochastically.
    """
    scale, step_size, root_scale, gain1, keep2, gain2, eps, decay = scalars.unbind()
    old_avg, old_sq = upcast(exp_avg), upcast(exp_avg_sq)
    scaled = grad * scale
    new_avg = old_avg + (scaled - old_avg) * gain1
    new_sq = old_sq * keep2 + scaled * scaled * gain2
    update = new_avg / (new_sq.sqrt() * root_scale + eps)
    old = master
    if values is not None and not master.dtype.is_floating_point:
        old = join_master(values, master)
    new = torch.where(apply, old * decay - update * step_size, old)
    if place is not None:
        new_avg, new_sq = _rounded_moments(new_avg, new_sq, place)
    exp_avg.copy_(torch.where(apply, new_avg, exp_avg))
    exp_avg_sq.copy_(torch.where(apply, new_sq, exp_avg_sq))
    if values is None:
        master.copy_(new)
    elif master.dtype.is_floating_point:
        master.copy_(new)
        values.copy_(torch.where(apply, round_master(new, values.dtype), values))
    else:
        rounded, remainder = split_master(new)
        values.copy_(rounded)
        master.copy_(remainder)


def _rounded_moments(exp_avg: Tensor, exp_avg_sq: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in bf16; one random word serves both."""
    low, high, first, stride = place.unbind()
    rows = torch.arange(exp_avg.shape[0], device=place.device)
    columns = torch.arange(exp_avg.shape[1], device=place.device)
    bits = philox((low, high), first + rows[:, None] * stride + columns)[0]
    return round_stochastic(exp_avg, bits), round_stochastic(exp_avg_sq, bits >> 16)
