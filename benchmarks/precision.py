"""What number formats do to a loss curve: one run of a 100M-parameter model on the demo's text in
each format, through `models/llama/train.py`, with the same samples, initial weights and schedule.

`python -m benchmarks.precision --out runs/precision` trains and prints the table;
`--draw runs/precision/losses.jsonl` prints it again from the record and draws the curves, on a
machine without a GPU too.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
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

BASE = "bf16"
"""The run that the others are compared with."""

LAST_STEPS = 20
"""The final loss is the mean over this many steps at the end."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The model and its training."""

    out: Path = Path("runs/precision")
    """Folder for the record, and for what each run prints."""
    draw: Path | None = None
    """Train nothing: read this record, print the table, and draw a picture beside it."""
    runs: tuple[str, ...] = ("bf16", "fp32", "fp8", "fp8-te")
    """Formats, by name."""
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
    learning_rate: float = 3e-4
    """At its highest, after a third of the steps; it ends at a tenth. At 1e-3 the loss leaps on the
    way, and runs that differ in rounding alone part by 2 %."""
    data_mb: int = 24
    """How much text to take, in 10^6 bytes."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to train."""


def train_command(report: Report, name: str, corpus: Path, save: Path) -> list[str]:
    """The command of a run."""
    heads = report.hidden_size // 64
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
        "--train.micro-batch-size", str(report.batch_size), "--save", str(save),
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
    """Run every format; a failed one loses none of the others."""
    with tempfile.TemporaryDirectory() as folder, record.open("w") as out:
        corpus = prepare_corpus(report, Path(folder))
        for name in report.runs:
            save = Path(folder) / name
            start = time.monotonic()
            log = report.out / f"{name}.log"
            with log.open("w") as text:
                command = train_command(report, name, corpus, save)
                status = subprocess.run(command, check=False, stdout=text, stderr=text).returncode
            took = time.monotonic() - start
            last = log.read_text().splitlines()[-1:]
            print(f"== {name}: exit status {status} after {took:.0f} s: {last}", flush=True)
            if status:
                continue
            for line in (save / "metrics.jsonl").read_text().splitlines():
                row = json.loads(line)
                if "loss" in row:
                    kept = {"precision": name, "step": row["step"], "loss": row["loss"]}
                    out.write(json.dumps(kept) + "\n")
            out.flush()
            shutil.rmtree(save)  # with its checkpoint, of which nothing is needed


def read_record(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and losses by format."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        curves.setdefault(row["precision"], []).append((row["step"], row["loss"]))
    return curves


def final_loss(curve: list[tuple[int, float]]) -> float:
    """Mean loss of the last steps."""
    return statistics.fmean(loss for _, loss in curve[-LAST_STEPS:])


def table(curves: Mapping[str, list[tuple[int, float]]]) -> str:
    """Final losses, and their difference from the base's."""
    lines = [f"{'format':12} {'steps':>5} {'first':>8} {'final':>8} {'over ' + BASE:>10}"]
    base = final_loss(curves[BASE]) if BASE in curves else None
    for name, curve in curves.items():
        last = final_loss(curve)
        share = "" if base is None else f"{last / base - 1:+10.3%}"
        lines.append(f"{name:12} {len(curve):5} {curve[0][1]:8.4f} {last:8.4f} {share}")
    lines.append(f"final: mean over the last {LAST_STEPS} steps, nats per byte")
    return "\n".join(lines)


def draw(curves: Mapping[str, list[tuple[int, float]]], path: Path) -> None:
    """The curves, and below them their distance from the base's."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7, 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    base = dict(curves.get(BASE, []))
    for name, curve in curves.items():
        steps, losses = zip(*curve, strict=True)
        above.plot(steps, losses, label=name, linewidth=1)
        if base and name != BASE:
            apart = [loss / base[step] - 1 for step, loss in curve if step in base]
            below.plot(steps[: len(apart)], [100 * share for share in apart], linewidth=1)
        else:
            below.plot([], [])  # keeps the colours of both alike
    above.set(ylabel="nats per byte", title="One model, one order of samples, several formats")
    above.legend()
    below.set(xlabel="step", ylabel=f"% over {BASE}")
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
