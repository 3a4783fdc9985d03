"""The second half of a training step: from complete local gradients to updated parameters."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.regions import DataParallel
from core.optim.adamw import AdamW, ParameterState
from core.optim.gradients import ReplicaGradients
from core.optim.loss_scale import LossScale
from core.parallel.context import ParallelContext
from core.parallel.sharing import Sharing

_MEAN_STEPS = 100
"""Steps that the running mean of gradient norms remembers."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, as 0-dim tensors on the device, for the host to read a step later."""

    grad_norm: Tensor
    """Global norm before clipping, the loss scale undone, fp64."""
    applied: Tensor
    """Whether parameters were updated, bool."""
    loss_scale: Tensor
    """The loss scale of this step, fp32."""


class OptimizerStep:
    """Owns the optimizer's state. All ranks take the same decision: they see the same norm.

    Usage, once per step:
        data_parallel.begin_step(microbatches), then forward and backward of loss *
        optimizer.loss_scale.scale, for every microbatch; then `step`.
    """

    def __init__(
        self,
        data_parallel: DataParallel,
        sharing: Sharing,
        ctx: ParallelContext,
        config: OptimizerConfig,
        precision: PrecisionConfig,
        seed: int = 0,
    ) -> None:
        """Allocate the state for this rank's regions.

        Collective over the replica: see `ReplicaGradients`. `seed` is that of stochastic rounding.
        """
        self._data_parallel, self._config = data_parallel, config
        regions = data_parallel.regions
        self._gradients = ReplicaGradients(regions, data_parallel.counted, sharing, ctx)
        self.adamw = AdamW(regions, ctx.device, config, precision, seed)
        self.loss_scale = LossScale(precision, ctx.device)
        self._mean_norm = torch.zeros((), dtype=torch.float64, device=ctx.device)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, valid: Tensor | None = None) -> StepResult:
        """Reduce gradients, update parameters, clear gradients; the host does not wait.

        The step is skipped, leaving every bit of parameters and optimizer state, if the gradient
        norm is not finite, or a spike (`OptimizerConfig.spike_factor`), or `valid` is false.

        Collectives: the sum over dp of what has not been summed yet, one sum per sharing group of
        partial gradients, the norm, and the start of whatever brings updated parameters to all
        ranks.

        Args:
            lr: learning rate.
            weight_decay: weight decay.
            valid: 0-dim bool, the same on all ranks: false where the step has nothing to learn
                from, such as no valid token.
        """
        self._data_parallel.finish()
        self._gradients.reduce_partial()
        scale = self.loss_scale.scale.clone()
        norm = self._gradients.norm() / scale
        finite = norm.isfinite()
        apply = finite if valid is None else finite & valid
        if self._config.spike_factor is not None:
            first = self.adamw.step_count == 0
            apply = apply & (first | (norm <= self._config.spike_factor * self._mean_norm))
        self.adamw.step(
            lr=lr,
            weight_decay=weight_decay,
            grad_scale_inverse=scale.double().reciprocal(),
            clip_coefficient=self._clip_coefficient(norm),
            apply=apply,
            updated=self._data_parallel.publish,
        )
        self._data_parallel.zero()
        gain = self.adamw.step_count.clamp(1, _MEAN_STEPS).double().reciprocal()
        mean = self._mean_norm + (norm - self._mean_norm) * gain
        self._mean_norm.copy_(torch.where(apply, mean, self._mean_norm))
        self.loss_scale.update(~finite)
        return StepResult(norm, apply, scale)

    def state_tensors(self) -> Iterator[ParameterState]:
        """All per-parameter state, as live views; see `AdamW.state_tensors`."""
        return self.adamw.state_tensors()

    def state_dict(self) -> dict[str, Any]:
        """All other state, as plain numbers; waits for the device."""
        return {
            "step_count": int(self.adamw.step_count),
            "mean_grad_norm": float(self._mean_norm),
            "loss_scale": self.loss_scale.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.adamw.step_count.fill_(state["step_count"])
        self._mean_norm.fill_(state["mean_grad_norm"])
        self.loss_scale.load_state_dict(state["loss_scale"])

    def _clip_coefficient(self, norm: Tensor) -> Tensor | float:
        if self._config.clip_grad == 0.0:
            return 1.0
        return torch.clamp(self._config.clip_grad / (norm + 1e-6), max=1.0)
