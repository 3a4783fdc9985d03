"""Compare training steps side by side on one GPU: ours, Hugging Face, Megatron-Core.

`python -m benchmarks.compare` measures all pairs that can run here; `--pairs dense8b:ours:megatron`
some of them. Each pair has a process of its own with both contestants resident, timed in turns; the
table comes last. Speeds of different pairs were not measured side by side: compare the ratios.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.contestants.registry import entry, unavailable
from benchmarks.records import Outcome
from benchmarks.table import table
from benchmarks.workloads import Workload, workload
from core.config.loading import exit_on_user_error
from core.errors import ConfigError

PAIRS = (
    "dense8b:ours:megatron",
    "dense8b:ours-fp8:megatron-fp8-current",
    "dense8b:ours-fp8:megatron-fp8-delayed",
    "dense8b:ours:hf-compile",
    "dense8b:ours:hf-tuned",
    "dense1b:ours:megatron",
    "dense1b:ours:hf-compile",
    "dense1b:ours:hf-tuned",
    "gpt:ours:megatron",
    "gpt:ours:hf-compile",
    "gpt:ours:hf-tuned",
    "full8b:ours",
    "dense8b:ours-te:megatron",
    "dense8b:ours-te-fp8:megatron-fp8-delayed",
    "dense8b:ours:hf-eager",
)
"""By default, the most telling first, as a budget may end the rest."""

RESULT, RESULT_OF_FIRST = "result.json", "first.json"

LEAST_SECONDS = 25.0
"""Less time than this is not worth starting a pair in."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What to compare, and for how long."""

    pairs: tuple[str, ...] = PAIRS
    """WORK:CONTESTANT:CONTESTANT, or WORK:CONTESTANT alone."""
    rounds: int = 3
    """Blocks of each contestant."""
    steps: int = 5
    """Steps of a block."""
    warmup: int = 4
    """Steps before the clock starts."""
    ceiling_seconds: float = 0.35
    """How long each matrix product of a work is run for its ceiling, with the work's first pair;
    0 leaves the ceiling out."""
    budget_seconds: float = 540.0
    """Start no pair, and leave none running, after this long."""
    pair_seconds: float = 150.0
    """End a pair that takes longer."""
    placement: Literal["auto", "together", "turns"] = "auto"
    """together: both resident. turns: one after the other, A B A, in processes of their own. auto:
    together where the GPU has the memory."""
    profile: Path | None = None
    """Write there where a step of each contestant spends its time."""
    out: Path | None = None
    """Write the table there too."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu is to try the comparison itself, with the work `tiny`."""


def parse_pair(text: str) -> tuple[Workload, tuple[str, ...]]:
    """The work and the contestants of an entry of `--pairs`.

    Raises:
        ConfigError: it names none or too many, or one that does not exist.
    """
    name, *contestants = text.split(":")
    if not 1 <= len(contestants) <= 2:
        raise ConfigError(
            f"--pairs {text} is not of the form WORK:CONTESTANT:CONTESTANT or WORK:CONTESTANT"
        )
    for contestant in contestants:
        entry(contestant)
    work = workload(name)
    if work.memory_lean and any(entry(one).kind != "ours" for one in contestants):
        raise ConfigError(f"--pairs {text}: {name} has no peer of the same precision contract")
    return work, tuple(contestants)


class Runner:
    """Starts a process for each pair, within the budget."""

    def __init__(self, options: Compare, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._start = time.monotonic()
        self._measured_ceilings: set[str] = set()
        self._gib = _device_gib() if options.device == "cuda" else float("inf")

    def run(self, work: Workload, names: tuple[str, ...]) -> Outcome:
        """Measure a pair, or say why not."""
        for name in names:
            reason = unavailable(name)
            if reason:
                return Outcome(work.name, names, refused=f"{name}: {reason}")
        if self._gib < work.gib:
            why = f"it needs {work.gib:.0f} GiB, and the GPU has {self._gib:.0f}"
            return Outcome(work.name, names, refused=why)
        if self._left() < LEAST_SECONDS:
            return Outcome(work.name, names, refused="no time left")
        fits = self._gib >= 2 * work.gib + 2 or self._options.placement == "together"
        if len(names) == 1 or (fits and self._options.placement != "turns"):
            outcome = self._process(work, names, rounds=self._options.rounds)
            full = outcome.refused.startswith("out of memory")
            if len(names) == 1 or not full or self._options.placement == "together":
                return outcome
            print("both do not fit: in turns now", flush=True)
        return self._in_turns(work, names)

    def _in_turns(self, work: Workload, names: tuple[str, ...]) -> Outcome:
        """A B A, each in a process of its own; the gate holds between processes."""
        outcomes: list[Outcome] = []
        for number, name in enumerate((names[0], names[1], names[0])):
            outcome = self._process(work, (name,), rounds=1, beside=number > 0)
            if outcome.refused:
                return dataclasses.replace(outcome, contestants=names)
            outcomes.append(outcome)
            if number == 0:
                (self._folder / RESULT).rename(self._folder / RESULT_OF_FIRST)
        first = outcomes[0]
        ours, other, again = (outcome.timed[0] for outcome in outcomes)
        ours.blocks += again.blocks
        ours.clocks += again.clocks
        other.blocks = other.blocks * 2  # its one block ran next to both of the first
        return dataclasses.replace(first, contestants=names, timed=[ours, other], in_turns=True)

    def _process(
        self, work: Workload, names: tuple[str, ...], *, rounds: int, beside: bool = False
    ) -> Outcome:
        options, result = self._options, self._folder / RESULT
        result.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "benchmarks.pair", "--work", work.name, "--contestants", *names,
            "--rounds", str(rounds), "--steps", str(options.steps),
            "--warmup", str(options.warmup), "--device", options.device, "--result", str(result),
        ]  # fmt: skip
        if beside:
            command += ["--beside", str(self._folder / RESULT_OF_FIRST)]
        if options.profile is not None:
            command += ["--profile", str(options.profile)]
        if work.name not in self._measured_ceilings:
            command += ["--ceiling-seconds", str(options.ceiling_seconds)]
        limit = min(options.pair_seconds, max(1.0, self._left()))
        status = _run(command, limit)
        if not result.exists():
            what = f"no end after {limit:.0f} s" if status is None else f"exit status {status}"
            return Outcome(work.name, names, refused=what)
        outcome = Outcome.from_json(json.loads(result.read_text()))
        if outcome.ceiling:
            self._measured_ceilings.add(work.name)
        return dataclasses.replace(outcome, contestants=names)

    def _left(self) -> float:
        return self._options.budget_seconds - (time.monotonic() - self._start)


def _run(command: Sequence[str], limit: float) -> int | None:
    """Run a command and all that it starts for at most `limit` seconds; None if it took longer."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _device_gib() -> float:
    """Memory of the first GPU; asked of its tool, since this process must not take any."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise ConfigError("there is no nvidia-smi: --device cuda needs a GPU; try --device cpu")
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits", "--id=0"]
    found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return float(found) / 1024


@exit_on_user_error()
def main() -> None:
    options = tyro.cli(Compare, description=__doc__)
    pairs = [parse_pair(text) for text in options.pairs]
    if importlib.util.find_spec("benchmarks.pair") is None:
        raise ConfigError("benchmarks.pair is not found: run this in the root of the repository")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(options, Path(folder))
        for work, names in pairs:
            start = time.monotonic()
            outcome = runner.run(work, names)
            outcomes.append(outcome)
            said = outcome.refused or "measured"
            took = time.monotonic() - start
            print(f"== {work.name} {' and '.join(names)}: {said} ({took:.0f} s)", flush=True)
            text = table(outcomes)
            if options.out is not None:  # after every pair: a later one may be cut off
                options.out.write_text(text + "\n")
    print(f"\n{table(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
