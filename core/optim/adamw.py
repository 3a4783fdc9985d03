"""AdamW over flat regions, one pass over memory per step (Kingma & Ba, 2015; Loshchilov & Hutter,
2019), with everything that varies from step to step on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.regions import ALIGNMENT, Fragment, Region
from core.kernels.compile import compiled, upcast
from core.optim.rounding import join_master, round_master, split_master
from core.optim.rounding_draws import RoundingDraws, rounded_moments, rows_by_index, whole_rows

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
        cut = whole_rows if narrow is None else rows_by_index
        self._rows = [cut(region) for region in regions]
        self._draws = None if narrow is None else RoundingDraws(self._rows, device, seed)

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
        new_avg, new_sq = rounded_moments(new_avg, new_sq, place)
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
