"""What number formats do to a loss curve: runs of a 100M-parameter model on the demo's text in each
format, through `models/llama/train.py`. Runs of one seed have the same samples, initial weights and
schedule. `bf16-again` takes its microbatches by halves: it differs from bf16 in roundings of sums
alone, so what lies between these two is no format's doing.

`python -m benchmarks.precision --out runs/precision` trains and prints the table;
`--draw runs/precision/losses.jsonl` prints it again from the record and draws the curves, on a
machine without a GPU too.
"""

import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import tyro

from core.config.loading import exit_on_user_error
from core.config.suggestions import did_you_mean
from core.errors import ConfigError
from examples.demo import source_files

RUNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": ("--precision.dtype", "bf16"),
        "bf16-again": ("--precision.dtype", "bf16"),
        "fp32": ("--precision.dtype", "fp32"),
        "fp8": ("--precision.dtype", "bf16", "--precision.fp8", "current"),
        "fp8-rowwise": ("--precision.dtype", "bf16", "--precision.fp8", "rowwise"),
        "fp8-te": (
            "--precision.dtype", "bf16", "--precision.fp8", "delayed",
            "--backend", "transformer_engine",
        ),
    }
)  # fmt: skip
"""Options of each run."""

BASE, AGAIN = "bf16", "bf16-again"
"""The run that the others are compared with, and its control."""

LAST_STEPS = 20
"""The final loss is the mean over this many steps at the end."""

Curve = list[tuple[int, float]]
"""Steps and losses."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The model and its training."""

    out: Path = Path("runs/precision")
    """Folder for the record, and for what each run prints."""
    draw: Path | None = None
    """Train nothing: read this record, print the table, and draw a picture beside it."""
    runs: tuple[str, ...] = ("bf16", "bf16-again", "fp32", "fp8", "fp8-te")
    """Formats, by name."""
    seeds: tuple[int, ...] = (1,)
    """Of samples and weights: each format runs with each."""
    jobs: int = 1
    """Runs at a time. A small model leaves a GPU idle between kernels; with several their speeds
    mean nothing."""
    steps: int = 300
    """Steps of each run."""
    layers: int = 16
    """Layers of the model."""
    hidden_size: int = 768
    """Width; heads are of 64, a third as many for keys and values, and the MLP 8 / 3 as wide."""
    seq_length: int = 1024
    """Bytes per sample."""
    batch_size: int = 8
    """Samples per step. fp32 products have no tensor cores, so few."""
    learning_rate: float = 1e-4
    """At its highest, after a third of the steps; it ends at a tenth. Runs that differ in rounding
    alone part by 0.1 % at 1e-4, by 0.3 % at 3e-4 (means of a few seeds), and by more at 1e-3, where
    the loss leaps on the way."""
    data_mb: int = 24
    """How much text to take, in 10^6 bytes."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to train."""


def train_command(report: Report, name: str, seed: int, corpus: Path, save: Path) -> list[str]:
    """The command of a run."""
    heads = report.hidden_size // 64
    micro_batch = report.batch_size // (2 if name == AGAIN else 1)
    return [
        sys.executable, "models/llama/train.py", "--preset", "tiny", "--tokenizer", "byte",
        "--device", report.device, *RUNS[name],
        "--model.num-layers", str(report.layers), "--model.hidden-size", str(report.hidden_size),
        "--model.num-attention-heads", str(heads), "--model.head-dim", "64",
        "--model.num-query-groups", str(max(1, heads // 3)),
        "--model.ffn-hidden-size", str(report.hidden_size * 8 // 3),
        "--data.train", str(corpus), "--data.split", "100,0,0",
        "--data.seq-length", str(report.seq_length),
        "--train.steps", str(report.steps), "--train.global-batch-size", str(report.batch_size),
        "--train.micro-batch-size", str(micro_batch), "--train.seed", str(seed),
        "--save", str(save),
        "--optimizer.lr", str(report.learning_rate),
        "--optimizer.min-lr", str(report.learning_rate / 10),
        "--optimizer.warmup-steps", str(report.steps // 3),
    ]  # fmt: skip


def prepare_corpus(report: Report, folder: Path) -> Path:
    """Tokenise the demo's text; returns the corpus's prefix."""
    sources, corpus = folder / "sources.jsonl", folder / "corpus"
    with sources.open("w") as out:
        for name in source_files(report.data_mb * 1_000_000):
            out.write(json.dumps({"text": Path(name).read_text(encoding="utf-8")}) + "\n")
    command = ["-m", "core.data.preprocess", "--input", str(sources), "--output", str(corpus)]
    subprocess.run([sys.executable, *command, "--tokenizer", "byte"], check=True)
    return corpus


def train(report: Report, record: Path) -> None:
    """Run every format with every seed; a failed run loses none of the others."""
    with tempfile.TemporaryDirectory() as folder, record.open("w") as out:
        corpus = prepare_corpus(report, Path(folder))

        def run(case: tuple[int, str]) -> tuple[int, str, Path | None]:
            seed, name = case
            save = Path(folder) / f"{name}-{seed}"
            start = time.monotonic()
            log = report.out / f"{name}-{seed}.log"
            with log.open("w") as text:
                command = train_command(report, name, seed, corpus, save)
                status = subprocess.run(command, check=False, stdout=text, stderr=text).returncode
            took = time.monotonic() - start
            last = log.read_text().splitlines()[-1:]
            print(
                f"== {name}, seed {seed}: exit status {status} after {took:.0f} s: {last}",
                flush=True,
            )
            return seed, name, None if status else save

        with ThreadPoolExecutor(report.jobs) as pool:
            for seed, name, save in pool.map(run, itertools.product(report.seeds, report.runs)):
                if save is None:
                    continue
                for line in (save / "metrics.jsonl").read_text().splitlines():
                    row = json.loads(line)
                    if "loss" in row:
                        kept = {"precision": name, "seed": seed}
                        kept |= {"step": row["step"], "loss": row["loss"]}
                        out.write(json.dumps(kept) + "\n")
                out.flush()
                shutil.rmtree(save)  # with its checkpoint, of which nothing is needed


def read_record(path: Path) -> dict[str, dict[int, Curve]]:
    """Curves by format and seed."""
    curves: dict[str, dict[int, Curve]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        curve = curves.setdefault(row["precision"], {}).setdefault(row["seed"], [])
        curve.append((row["step"], row["loss"]))
    return curves


def final_loss(curve: Curve) -> float:
    """Mean loss of the last steps."""
    return statistics.fmean(loss for _, loss in curve[-LAST_STEPS:])


def mean_curve(curves: Iterable[Curve]) -> Curve:
    """Of several seeds, as far as all go."""
    return [
        (rows[0][0], statistics.fmean(loss for _, loss in rows))
        for rows in zip(*curves, strict=False)
    ]


def table(curves: Mapping[str, Mapping[int, Curve]]) -> str:
    """Final losses as means over seeds, and the difference from the base's, seed by seed: its mean,
    its standard error, and the largest of them.
    """
    title = f"over {BASE}"
    lines = [
        f"{'format':12} {'seeds':>5} {'first':>8} {'final':>8} {title:>10} {'error':>7} "
        f"{'largest':>8}"
    ]
    base = {seed: final_loss(curve) for seed, curve in curves.get(BASE, {}).items()}
    for name, by_seed in curves.items():
        first = statistics.fmean(curve[0][1] for curve in by_seed.values())
        last = statistics.fmean(final_loss(curve) for curve in by_seed.values())
        line = f"{name:12} {len(by_seed):5} {first:8.4f} {last:8.4f}"
        apart = [
            final_loss(curve) / base[seed] - 1 for seed, curve in by_seed.items() if seed in base
        ]
        if apart:
            line += f" {statistics.fmean(apart):+10.3%}"
        if len(apart) > 1:
            error = statistics.stdev(apart) / math.sqrt(len(apart))
            line += f" {error:7.3%} {max(apart, key=abs):+8.3%}"
        lines.append(line)
    lines.append(
        f"final: mean over the last {LAST_STEPS} steps, nats per byte; error: standard error of the"
    )
    lines.append("mean over seeds")
    return "\n".join(lines)


def draw(curves: Mapping[str, Mapping[int, Curve]], path: Path) -> None:
    """The curves, and below them their distance from the base's, both as means over seeds."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    base = curves.get(BASE, {})
    for name, by_seed in curves.items():
        above.plot(*zip(*mean_curve(by_seed.values()), strict=True), label=name, linewidth=1)
        apart = [
            [(step, 100 * (loss / other - 1)) for (step, loss), (_, other) in pairs]
            for pairs in (zip(by_seed[s], base[s], strict=False) for s in by_seed if s in base)
        ]
        # What draws nothing keeps the colours of both alike.
        points = mean_curve(apart) if apart and name != BASE else []
        below.plot([step for step, _ in points], [share for _, share in points], linewidth=1)
    above.set(ylabel="nats per byte", title="One model and its samples in several formats")
    above.legend()
    below.set(xlabel="step", ylabel=f"% over {BASE}, seed by seed")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@exit_on_user_error()
def main() -> None:
    report = tyro.cli(Report, description=__doc__)
    for name in report.runs:
        if name not in RUNS:
            raise ConfigError(f"there is no run {name}: {did_you_mean(name, RUNS)}")
    record = report.draw
    if record is None:
        report.out.mkdir(parents=True, exist_ok=True)
        record = report.out / "losses.jsonl"
        train(report, record)
    curves = read_record(record)
    if not curves:
        raise ConfigError(f"{record} has no losses: see the messages above")
    if report.draw is not None:
        draw(curves, record.with_suffix(".png"))
    print(table(curves), flush=True)


if __name__ == "__main__":
    main()
