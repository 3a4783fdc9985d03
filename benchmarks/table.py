"""The outcome of a comparison as text."""

import statistics
from collections.abc import Sequence

from benchmarks.records import Outcome, Timed, ratios
from benchmarks.workloads import Workload, workload

HEADER = (
    f"{'work':8} {'contestant':20} {'tokens/s':>9} {'ms':>8} {'p10':>8} {'p90':>8} "
    f"{'causal':>7} {'full':>6} {'of ceil.':>8} {'GiB':>6} {'ratio':>6} {'least':>6}"
)

NOTES = """\
tokens/s and ms by the median step, with the 10th and 90th percentile; causal, full: model TFLOP/s
with attention counted by half or whole; of ceil.: causal over the sustained rate of the work's own
bf16 matrix products (weighted by FLOPs, in the same run); GiB: peak allocated in a contestant's own
steps less what was there before it was built; ratio: speed of a pair's first contestant over the
second's, median over the blocks that ran next to each other, and the least of them."""


def table(outcomes: Sequence[Outcome]) -> str:
    """All outcomes: a row for each contestant, what was refused, machine and ceilings."""
    measured = {one.work: one for one in outcomes if one.ceiling}
    lines = [HEADER, "-" * len(HEADER)]
    refused, clocks = [], []
    for outcome in outcomes:
        names = " and ".join(outcome.contestants)
        if outcome.refused:
            refused.append(f"{outcome.work} {names}: not timed, {outcome.refused}")
            continue
        ceiling = measured[outcome.work].ceiling if outcome.work in measured else 0.0
        lines += _rows(workload(outcome.work), outcome.timed, ceiling)
        if len(outcome.timed) == 2:
            lines.append(f"         {_agreement(outcome)}")
        states = [state for record in outcome.timed for state in record.clocks if state]
        if states:
            clocks.append(f"clocks, {outcome.work} {names}: {'; '.join(states)}")
    lines += ["", *refused, NOTES]
    for name, one in measured.items():
        parts = ", ".join(f"{part} {rate:.0f}" for part, rate in one.ceiling_parts.items())
        lines.append(f"ceiling of {name}: {one.ceiling:.0f} TFLOP/s ({parts})")
    lines += [f"on {machine}" for machine in dict.fromkeys(o.machine for o in outcomes) if machine]
    return "\n".join(lines + clocks)


def _rows(work: Workload, timed: Sequence[Timed], ceiling: float) -> list[str]:
    config = work.config()
    lines = []
    for number, record in enumerate(timed):
        rate = work.tokens / record.median
        causal, full = (
            rate * config.flops_per_token(work.seq_length, causal=half) / 1e12
            for half in (True, False)
        )
        low, high = _tails(record.seconds)
        share = f"{causal / ceiling:8.3f}" if ceiling else f"{'':8}"
        row = (
            f"{work.name:8} {record.name:20} {rate:9,.0f} {record.median * 1e3:8.1f} "
            f"{low * 1e3:8.1f} {high * 1e3:8.1f} {causal:7.1f} {full:6.1f} {share} "
            f"{record.peak_gib:6.1f}"
        )
        if number == 0 and len(timed) == 2:
            by_block = ratios(*timed)
            row += f" {statistics.median(by_block):6.3f} {min(by_block):6.3f}"
        lines.append(row)
    return lines


def _tails(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[0], tenths[-1]


def _agreement(outcome: Outcome) -> str:
    first, second = outcome.timed
    apart = [abs(a - b) for a, b in zip(first.losses, second.losses, strict=False)]
    drift = max(first.spread, second.spread)
    turns = "; not resident together: A B A in turns" if outcome.in_turns else ""
    return (
        f"first losses {first.losses[0]:.5f} and {second.losses[0]:.5f}, at most {max(apart):.1e} "
        f"apart in {len(apart)} steps; block medians within {drift:.1%}{turns}"
    )
