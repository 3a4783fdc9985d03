import dataclasses
import json

import pytest

from benchmarks.records import Outcome, Timed, ratios
from benchmarks.table import table
from benchmarks.workloads import workload


def _timed(name: str, *blocks: list[float], loss: float = 12.5) -> Timed:
    return Timed(
        name, losses=[loss, 12.4, 12.3], token_losses=[1.0], blocks=list(blocks), peak_gib=58.2
    )


def test_a_ratio_compares_blocks_that_ran_side_by_side() -> None:
    # The clocks fall to half in the second block: the speeds change, the ratio does not.
    first, second = _timed("a", [1.0, 1.0], [2.0, 2.0]), _timed("b", [1.1, 1.1], [2.2, 2.2])
    assert ratios(first, second) == pytest.approx([1.1, 1.1])
    assert first.median == 1.5
    assert first.spread == pytest.approx(1 / 1.5)


def test_an_outcome_survives_json() -> None:
    outcome = Outcome("dense8b", ("a", "b"), [_timed("a", [1.0])], ceiling=700.0)
    again = Outcome.from_json(json.loads(json.dumps(dataclasses.asdict(outcome))))
    assert dataclasses.replace(again, contestants=tuple(again.contestants)) == outcome


def test_the_table_has_rates_ratio_ceiling_and_what_was_refused() -> None:
    work = workload("dense8b")
    config = work.config()
    timed = [_timed("ours", [0.8] * 3, [0.8] * 3), _timed("megatron", [0.9] * 3, [0.88] * 3)]
    outcomes = [
        Outcome("dense8b", ("ours", "megatron"), timed, ceiling=650.0, ceiling_parts={"qkv": 640}),
        Outcome("dense1b", ("ours", "hf-eager"), refused="the losses of step 0 are apart"),
    ]
    text = table(outcomes)
    row = next(line for line in text.splitlines() if line.startswith("dense8b  ours")).split()
    tokens, causal, full, share = (float(row[i].replace(",", "")) for i in (2, 6, 7, 8))
    assert tokens == round(work.tokens / 0.8)
    flops = config.flops_per_token(8192, causal=True)
    assert causal == pytest.approx(work.tokens / 0.8 * flops / 1e12, abs=0.1)
    assert full > causal
    assert share == pytest.approx(causal / 650.0, abs=1e-3)
    assert [float(value) for value in row[-2:]] == [pytest.approx(1.1125, abs=1e-3), 1.1]
    assert "dense1b ours and hf-eager: not timed, the losses of step 0 are apart" in text
    assert "ceiling of dense8b: 650 TFLOP/s (qkv 640)" in text
