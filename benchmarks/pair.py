"""One comparison in this process: build, prove that both compute the same, time in turns.

Run by `benchmarks.compare`, a process for each pair, so that memory is clean and a failure loses no
other pair. Results go to a JSON file.
"""

import json
import os
import platform
import statistics
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.contestants.registry import PARITY_STEPS, Contestant, build, entry
from benchmarks.gemm_ceiling import ceiling
from benchmarks.profiles import describe, record
from benchmarks.records import Outcome, Timed
from benchmarks.timing import in_turns, short_collections
from benchmarks.workloads import Workload, workload

TOLERANCE, TOLERANCE_FP8 = 5e-3, 0.1
"""By how much the mean losses of a step may differ. The first is of the same weights in both, and
meets the first number in any format. Later ones of a contestant in FP8 follow other updates:
delayed scaling knows no gradient's size in its first step, and loses small ones."""

FIRST_TOKENS = 64
"""Positions whose losses are compared one by one. At these, attention has few values to average, so
that mixed-up heads or positions show; in the mean over all tokens they do not."""

TOKEN_TOLERANCE, TOKEN_TOLERANCE_FP8 = 0.05, 0.25
"""By how much these may differ, as a mean, in standard deviations over tokens."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What to measure."""

    work: str = "tiny"
    """Name of the work."""
    contestants: tuple[str, ...] = ("ours", "hf-eager")
    """One or two names; two are resident together."""
    rounds: int = 3
    """Blocks of each contestant."""
    steps: int = 5
    """Steps of a block."""
    warmup: int = 4
    """Steps before the clock starts, those of the parity gate included."""
    beside: Path | None = None
    """Result of another process, whose first contestant this one must agree with."""
    ceiling_seconds: float = 0.0
    """How long each matrix product of the work is run for the ceiling; 0 leaves it out."""
    profile: Path | None = None
    """Write where a step's time goes here, after the timing."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    result: Path | None = None
    """JSON file for the result."""


def parity(first: Timed, second: Timed) -> str:
    """Why two contestants do not compute the same; empty where they do."""
    fp8 = any(entry(one.name).fp8 for one in (first, second))
    pairs = list(zip(first.token_losses, second.token_losses, strict=True))
    apart = statistics.fmean(abs(a - b) for a, b in pairs) / statistics.pstdev(first.token_losses)
    allowed = TOKEN_TOLERANCE_FP8 if fp8 else TOKEN_TOLERANCE
    if not apart <= allowed:  # also where one is not a number
        return (
            f"the first {len(pairs)} tokens' losses are {apart:.3f} standard deviations apart, "
            f"allowed are {allowed}: other weights, or another model"
        )
    for step in range(PARITY_STEPS):
        a, b = first.losses[step], second.losses[step]
        allowed = TOLERANCE_FP8 if fp8 and step else TOLERANCE
        if not abs(a - b) <= allowed:
            return (
                f"the losses of step {step} are {a:.5f} ({first.name}) and {b:.5f} "
                f"({second.name}): {abs(a - b):.1e} apart, allowed are {allowed:.0e}"
            )
    return ""


def prepare(
    name: str, work: Workload, pair: Pair, device: torch.device
) -> tuple[Contestant, Timed]:
    """Build a contestant and run its first steps."""
    timed = Timed(name)
    held = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    contestant = build(name, work, work.config(), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what making the weights took is not of the steps
    contestant.token_losses()  # delayed scaling takes its scales from here: it begins with none
    tokens = contestant.token_losses()[:, :FIRST_TOKENS]
    timed.token_losses = tokens.flatten().tolist()
    with short_collections():
        for _ in range(max(pair.warmup, PARITY_STEPS)):
            timed.losses.append(contestant.step().item())
    timed.setup_seconds = time.perf_counter() - start
    if device.type == "cuda":
        timed.peak_gib = (torch.cuda.max_memory_allocated() - held) / 2**30
    losses = ", ".join(f"{loss:.5f}" for loss in timed.losses)
    print(
        f"{work.name} {name}: losses {losses}; {timed.peak_gib:.1f} GiB; ready after "
        f"{timed.setup_seconds:.1f} s",
        flush=True,
    )
    return contestant, timed


def measure(pair: Pair, outcome: Outcome) -> None:
    """Fill `outcome`, as far as one gets."""
    work = workload(pair.work)
    device = torch.device("cuda", 0) if pair.device == "cuda" else torch.device("cpu")
    outcome.machine = _machine(device)
    contestants = []
    for name in pair.contestants:
        contestant, timed = prepare(name, work, pair, device)
        contestants.append(contestant)
        outcome.timed.append(timed)
    both = list(outcome.timed)
    if pair.beside is not None:
        both += Outcome.from_json(json.loads(pair.beside.read_text())).timed[:1]
    if len(both) == 2:
        outcome.refused = parity(*both)
    if outcome.refused:
        return
    in_turns(contestants, outcome.timed, rounds=pair.rounds, steps=pair.steps, device=device)
    if pair.profile is not None and device.type == "cuda":
        with pair.profile.open("a") as out:
            for name, contestant in zip(pair.contestants, contestants, strict=True):
                out.write(describe(f"{work.name} {name}", record(contestant)) + "\n\n")
    if pair.ceiling_seconds:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        outcome.ceiling, outcome.ceiling_parts = ceiling(
            work, work.config(), device, pair.ceiling_seconds
        )


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    pair = tyro.cli(Pair, description=__doc__)
    outcome = Outcome(pair.work, pair.contestants)
    try:
        measure(pair, outcome)
    except torch.cuda.OutOfMemoryError as error:
        outcome.refused = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:
        traceback.print_exc()
        outcome.refused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if pair.result is not None:
        pair.result.write_text(json.dumps(asdict(outcome)))
    elif outcome.refused:
        raise SystemExit(outcome.refused)


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # What no contestant may use: see the safety notes of NVIDIA's NVLink multicast.
    for name, value in (
        ("NCCL_NVLS_ENABLE", "0"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
        ("UB_SKIPMC", "1"),
    ):
        os.environ.setdefault(name, value)
    main()
