import pytest

from core.errors import TrainingError
from core.training.step_reports import SkipLimit


def test_skips_in_a_row_end_the_run() -> None:
    limit = SkipLimit(3, min_loss_scale=1.0)
    nan = float("nan")
    for applied in (False, False, True, False, False):
        limit.observe(applied=applied, grad_norm=nan, loss_scale=1.0)
    with pytest.raises(TrainingError, match="3 steps in a row were skipped, the last with a"):
        limit.observe(applied=False, grad_norm=7.0, loss_scale=1.0)


def test_overflow_while_the_loss_scale_falls_is_not_counted() -> None:
    limit = SkipLimit(2, min_loss_scale=1.0)
    for norm in (float("inf"), float("nan")):
        for _ in range(5):
            limit.observe(applied=False, grad_norm=norm, loss_scale=8.0)
    limit.observe(applied=False, grad_norm=3.0, loss_scale=8.0)
    with pytest.raises(TrainingError):
        limit.observe(applied=False, grad_norm=float("inf"), loss_scale=1.0)
