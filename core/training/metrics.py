"""What a run reports: a JSONL file, trackers if asked for, and one line for a person.

Only rank 0 reports. Nothing here opens a socket but a tracker that was asked for by name.
"""

import importlib
import importlib.util
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from core.config.run import RunConfig
from core.errors import ConfigError, TesseraError, TrainingError
from core.parallel.context import ParallelContext
from core.training.exchange import DeviceMark
from core.training.task import TrainTask

METRICS_FILE = "metrics.jsonl"

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "MI300X": 1307.0,
}
"""Dense 16-bit TFLOP/s by a part of the device's name, the first match counting (makers' data
sheets)."""


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Data-sheet peak of this device for 16-bit matrix products; None if unknown or another
    format.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process since its start: allocated on a GPU, resident on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


@dataclass(frozen=True)
class Throughput:
    """Turns tokens and seconds into rates, per the two conventions for attention FLOPs."""

    flops_causal: float
    """Model FLOPs of a token, forward and backward, with the masked half of attention left out."""
    flops_full: float
    """The same with attention counted as a full matrix (Megatron-LM's convention)."""
    world_size: int
    peak: float | None
    """TFLOP/s of one device; None leaves MFU out."""

    @classmethod
    def of(
        cls, task: TrainTask, seq_length: int, ctx: ParallelContext, dtype: torch.dtype
    ) -> "Throughput":
        """Of a task's model on the devices of a run, at this length."""
        causal, full = (task.flops_per_token(seq_length, causal=c) for c in (True, False))
        return cls(causal, full, ctx.world.size, peak_tflops(ctx.device, dtype))

    def rates(self, tokens: int, seconds: float, steps: int) -> dict[str, float]:
        """Rates over `steps` steps that took `seconds` and consumed `tokens` on all ranks."""
        per_second = tokens / seconds
        values = {"step_seconds": seconds / steps, "tokens_per_second": per_second}
        for convention, flops in (("causal", self.flops_causal), ("full", self.flops_full)):
            achieved = per_second * flops / self.world_size / 1e12
            values[f"tflops_{convention}"] = achieved
            if self.peak is not None:
                values[f"mfu_{convention}"] = achieved / self.peak
        return values


# ---- Trackers ------------------------------------------------------------------------------------


class Tracker(Protocol):
    """Somewhere that metrics go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take one row."""

    def close(self) -> None:
        """Write out what is buffered."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run at its start."""

    name: str
    project: str
    folder: Path | None
    """The run's --save."""
    config: Mapping[str, Any]
    first_step: int
    """Steps done before; rows of later ones, left by a killed run, are dropped where that is
    possible."""


class JsonlTracker:
    """One JSON object a line, in `metrics.jsonl`; a resumed run continues the file."""

    def __init__(self, run: TrackedRun) -> None:
        assert run.folder is not None
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / METRICS_FILE
        cut_back(path, run.first_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row."""
        # A killed process must leave whole lines behind: one write, flushed at once.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self._file.name} cannot be written ({error.strerror}): free disk space"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Drop the rows after `step` from a metrics file, and a last line that was not finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # what a killed process was writing
        if row["step"] > step:
            break
        kept.append(line + "\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


class TensorBoardTracker:
    """Event files in `tensorboard` in --save, or in torch's default folder `runs`."""

    def __init__(self, run: TrackedRun) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        folder = None if run.folder is None else str(run.folder / "tensorboard")
        self._writer = module.SummaryWriter(folder, purge_step=run.first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out and close."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases, or Trackio, which has the same functions and writes a local database."""

    def __init__(self, run: TrackedRun, package: str = "wandb") -> None:
        self._module = importlib.import_module(package)
        self._module.init(project=run.project, name=run.name, config=dict(run.config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until everything is written or sent."""
        self._module.finish()


class TrackioTracker(WandbTracker):
    """Trackio."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run, "trackio")


class MlflowTracker:
    """MLflow, at its configured tracking address; by default a local folder."""

    def __init__(self, run: TrackedRun) -> None:
        self._module = importlib.import_module("mlflow")
        self._module.set_experiment(run.project)
        self._module.start_run(run_name=run.name)
        self._module.log_dict(dict(run.config), "config.json")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row."""
        self._module.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._module.end_run()


TRACKERS: Mapping[str, type[Any]] = {
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def open_trackers(family: str, config: RunConfig[Any], first_step: int) -> list[Tracker]:
    """Rank 0's trackers of a run that goes on after `first_step`: the file in --save, and those
    that were asked for.
    """
    folder = None if config.save is None else Path(config.save)
    run = TrackedRun(
        name=family if folder is None else folder.resolve().name,
        project=f"tessera-{family}",
        folder=folder,
        config=asdict(config),
        first_step=first_step,
    )
    files: list[Tracker] = [] if folder is None else [JsonlTracker(run)]
    return files + [TRACKERS[name](run) for name in config.train.track]


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of the trackers asked for are installed, without importing them.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"--train.track {name} needs the package {name}, which is not installed: run "
                "pip install 'tessera-zoo[track]', or leave it out"
            )


# ---- For a person --------------------------------------------------------------------------------


@dataclass
class Console:
    """Rank 0's line: a progress bar on a terminal, else one plain line per log interval."""

    enabled: bool
    total_steps: int = 0
    _bar: "tqdm[Any] | None" = field(default=None, init=False)

    def say(self, text: str) -> None:
        """Print lines above the progress bar, if there is one."""
        if self.enabled:
            # Nobody reads it any more, or its disk is full: no reason to end a run.
            with suppress(OSError):
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def start(self, first_step: int) -> None:
        """Open the progress bar if standard error is a terminal."""
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(total=self.total_steps, initial=first_step, unit="step", leave=True)

    def advance(self, step: int, summary: str | None) -> None:
        """A step is done. `summary` describes it, at log intervals."""
        if self._bar is not None:
            if summary is not None:
                self._bar.set_postfix_str(summary, refresh=False)
            self._bar.update(step - self._bar.n)
        elif summary is not None:
            self.say(f"step {step}/{self.total_steps} | {summary}")

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def summarize(values: Mapping[str, float]) -> str:
    """The metrics that a person wants in one line."""
    parts = [f"loss {values['loss']:.4f}", f"grad norm {values['grad_norm']:.3f}"]
    parts += [f"lr {values['learning_rate']:.3g}", f"{values['tokens_per_second']:,.0f} tokens/s"]
    if "mfu_causal" in values:
        parts.append(f"MFU {100 * values['mfu_causal']:.1f} %")
    elif values["tflops_causal"] >= 1.0:
        parts.append(f"{values['tflops_causal']:.1f} TFLOP/s")
    parts.append(f"{values['memory_gib']:.1f} GiB")
    if values.get("skipped_steps"):
        parts.append(f"{values['skipped_steps']:.0f} skipped")
    return " | ".join(parts)


def remaining(seconds_per_step: float, steps: int) -> str:
    """Time left, as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds_per_step * steps), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


@dataclass(frozen=True)
class FinishedStep:
    """A step that the device has done."""

    step: int
    """Steps done."""
    tokens: int
    """That all ranks consumed in it."""
    mark: DeviceMark
    """When."""


@dataclass
class Reporter:
    """Everything above, as the trainer sees it."""

    console: Console
    throughput: Throughput
    device: torch.device
    trackers: Sequence[Tracker] = ()
    _since: DeviceMark = field(init=False)
    _steps: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _save_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._since = DeviceMark(self.device)

    def start(self, first_step: int) -> None:
        """Begin to measure time."""
        self.console.start(first_step)
        self.pause_over()

    def pause_over(self) -> None:
        """Forget the time since the last row: an evaluation or a save is no training."""
        self._since, self._steps, self._tokens = DeviceMark(self.device), 0, 0

    def saved(self, name: str, seconds: float) -> None:
        """A checkpoint was written, or copied to be written in the background: training stood still
        for so long. The next row says so too, as `save_seconds`.
        """
        self.console.say(f"checkpoint {name} | training waited {seconds:.2f} s")
        self._save_seconds += seconds

    def step(self, done: FinishedStep, values: Mapping[str, float] | None) -> None:
        """Take a finished step, and its metrics at log intervals."""
        self._steps, self._tokens = self._steps + 1, self._tokens + done.tokens
        if values is None:
            self.console.advance(done.step, None)
            return
        seconds = done.mark.seconds_since(self._since)
        row = {**values, **self.throughput.rates(self._tokens, seconds, self._steps)}
        row["memory_gib"] = peak_memory_gib(self.device)
        if self._save_seconds:
            row["save_seconds"], self._save_seconds = self._save_seconds, 0.0
        left = remaining(row["step_seconds"], self.console.total_steps - done.step)
        self.console.advance(done.step, f"{summarize(row)} | {left}")
        self._log(done.step, row)
        self._since, self._steps, self._tokens = done.mark, 0, 0

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Take the result of an evaluation."""
        self.console.say(f"step {step} | validation loss {losses['loss']:.4f}")
        self._log(step, {f"validation_{name}": value for name, value in losses.items()})

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in tuple(self.trackers):
            self._ask(tracker, partial(tracker.log, step, values))

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self.console.close()
        for tracker in tuple(self.trackers):
            self._ask(tracker, tracker.close)

    def _ask(self, tracker: Tracker, work: Callable[[], object]) -> None:
        """Have a tracker do something. One that cannot is left out from then on: a server that is
        out of reach shall not end a run, whose own file has all rows.
        """
        try:
            work()
        except TesseraError:
            raise
        except Exception as error:
            self.trackers = [other for other in self.trackers if other is not tracker]
            what = f"{type(tracker).__name__} failed and gets no more metrics"
            self.console.say(f"{what}: {type(error).__name__}: {error}")
