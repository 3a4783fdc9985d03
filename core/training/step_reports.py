"""What steps did, as the host learns it: one step late, so that it never waits for the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core.config.run import RunConfig
from core.errors import TrainingError
from core.optim.step import StepResult
from core.training.exchange import LateValues
from core.training.metrics import FinishedStep, Reporter
from core.training.state import Position


class SkipLimit:
    """Counts skipped steps in a row on the host."""

    def __init__(self, limit: int, min_loss_scale: float) -> None:
        """Allow fewer than `limit`; an overflow while the loss scale can still fall is no sign of
        trouble and is not counted.
        """
        self._limit, self._min_loss_scale = limit, min_loss_scale
        self.consecutive = 0

    def observe(self, *, applied: bool, grad_norm: float, loss_scale: float) -> None:
        """Take note of one step.

        Raises:
            TrainingError: the limit is reached.
        """
        if applied:
            self.consecutive = 0
        elif loss_scale <= self._min_loss_scale or grad_norm < float("inf"):
            self.consecutive += 1
        if self.consecutive >= self._limit:
            raise TrainingError(
                f"{self.consecutive} steps in a row were skipped, the last with a gradient norm of "
                f"{grad_norm}: look at the data, lower --optimizer.lr, or raise "
                "--optimizer.max-consecutive-skips"
            )


@dataclass(frozen=True)
class PendingReport:
    """A step that the host has queued on the device but not yet looked at."""

    step: int
    consumed_samples: int
    samples: int
    learning_rate: float
    losses: tuple[str, ...]
    values: LateValues
    """`stop`, `grad_norm`, `applied`, `loss_scale`; `count/NAME` and `loss/NAME` for every loss;
    `metric/NAME`."""


class StepReports:
    """Keeps the last step until the host looks at it, and then reports it, counts it if it was
    skipped, and learns whether a rank wants to stop.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        position: Position,
        reporter: Reporter,
        min_loss_scale: float,
    ) -> None:
        """Count skips in a row from those of `position`, which is kept up to date."""
        self._train, self._seq_length = config.train, config.data.seq_length
        self._position, self._reporter = position, reporter
        self._skips = SkipLimit(config.optimizer.max_consecutive_skips, min_loss_scale)
        self._skips.consecutive = position.consecutive_skips
        self._pending: PendingReport | None = None

    def push(self, report: PendingReport) -> bool:
        """Keep a step, and read the one before; see `flush`."""
        previous, self._pending = self._pending, report
        return self._read(previous)

    def flush(self) -> bool:
        """Read the step that is kept, which waits for the device; returns whether a rank wants to
        stop.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        previous, self._pending = self._pending, None
        return self._read(previous)

    def _read(self, report: PendingReport | None) -> bool:
        if report is None:
            return False
        values, position = report.values.wait(), self._position
        applied = values["applied"] > 0.0
        self._skips.observe(
            applied=applied, grad_norm=values["grad_norm"], loss_scale=values["loss_scale"]
        )
        position.consecutive_skips = self._skips.consecutive
        position.skipped_steps += not applied
        row = None
        if report.step % self._train.log_interval == 0 or report.step == self._train.steps:
            row = {
                **mean_losses(values, report.losses),
                **{n.removeprefix("metric/"): x for n, x in values.items() if "metric/" in n},
                "grad_norm": values["grad_norm"],
                "learning_rate": report.learning_rate,
                "loss_scale": values["loss_scale"],
                "consumed_samples": report.consumed_samples,
                "skipped_steps": position.skipped_steps,
            }
        tokens = report.samples * self._seq_length
        self._reporter.step(FinishedStep(report.step, tokens, report.values.mark), row)
        return values["stop"] > 0.0


def late_values(
    stop: Tensor, counts: Mapping[str, Tensor], sums: Mapping[str, Tensor], result: StepResult
) -> LateValues:
    """Send to the host what a step did.

    Args:
        stop: how many ranks want to stop.
        counts: valid tokens of each loss.
        sums: of losses and metrics, as `StagedModel.train` names them, over all ranks.
        result: of the update.
    """
    return LateValues(
        {
            "stop": stop,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "loss_scale": result.loss_scale,
            **{f"count/{name}": count for name, count in counts.items()},
            **sums,
        }
    )


def mean_losses(values: Mapping[str, float], names: tuple[str, ...]) -> dict[str, float]:
    """`loss`, the sum of all means over valid tokens, and each of them if there are several."""
    means = {
        name: values[f"loss/{name}"] / values[f"count/{name}"]
        for name in names
        if values[f"count/{name}"]
    }
    total = sum(means.values()) if means else math.nan
    return {"loss": total} if len(names) == 1 else {**means, "loss": total}
