"""Speed and memory of every pipeline schedule, with even and with automatic ones, beside one GPU
and beside what the simulator predicts.

`torchrun --nproc-per-node 4 benchmarks/pipeline.py --out traces`; one stage per process. The
default work is that of `train_step.py` (8 layers of Llama-3-8B, vocabulary 128256, sequence 8192)
with 16 microbatches of one sample. Without GPUs: `--device cpu --preset tiny --layers 6
--seq-length 64 --dtype fp32`. Each case is compiled and warmed up, traced for one step, from which
the simulator gets the times of the actions, and then measured untraced.
"""

import dataclasses
import gc
import itertools
import os
import platform
import statistics
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import tyro

from core.config.data import DataConfig
from core.config.loading import exit_on_user_error
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig, validate_run
from core.config.suggestions import did_you_mean
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.loader import Batch
from core.errors import ConfigError
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.rendezvous import init_distributed
from core.pipeline.chosen import chosen_layout
from core.pipeline.costs import language_model_parts
from core.pipeline.layout import Layout
from core.pipeline.memory import (
    Microbatch,
    language_model_kept,
    predict_peak,
    state_bytes,
)
from core.pipeline.schedules import Schedule, make_schedule, stage_map_for
from core.pipeline.simulate import RECEIVE_SLOTS, Costs, Timeline, bubble_of, simulate, span_of
from core.pipeline.trace import measured_transfer, measured_work, write_trace
from core.training.exchange import DeviceMark
from core.training.staged_model import StagedModel
from core.training.step_trace import StepTrace
from core.training.trainer import DTYPES
from models.llama.config import PRESETS
from models.llama.train import llama_task

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"]
LayoutName = Literal["even", "automatic"]
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured."""

    preset: str = "llama3-8b"
    """Architecture."""
    layers: int = 8
    """Layers kept of it."""
    seq_length: int = 8192
    """Tokens per sample."""
    micro_batch_size: int = 1
    """Samples per microbatch."""
    microbatches: int = 16
    """Microbatches per step."""
    schedules: tuple[ScheduleName, ...] = ("1f1b", "interleaved", "zb_h1", "zbv", "gpipe")
    """Which, in this order."""
    layouts: tuple[LayoutName, ...] = ("automatic", "even")
    """even: as many layers on each piece, embedding and head beside the first and the last."""
    one_gpu: bool = True
    """First measure one GPU with the whole model, if it fits."""
    warmup: int = 2
    """Steps before the traced one."""
    steps: int = 4
    """Steps measured, after the traced one."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    memory_gib: float | None = None
    """A case that is predicted to need more is skipped; by default what a GPU has, less 4 GiB."""
    out: Path | None = None
    """Folder for the traced steps, for `python -m core.pipeline show --from-trace`."""


@dataclass(frozen=True)
class Case:
    """A schedule over a layout, and its memory as predicted."""

    name: str
    config: RunConfig[TransformerConfig]
    layout: Layout
    schedule: Schedule
    predicted_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """A case and what came out."""

    case: Case
    step_ms: float
    predicted_ms: float
    bubble: float
    simulated_bubble: float
    peak_bytes: tuple[int, ...]
    loss: float
    timeline: Timeline


def make_case(work: Work, config: TransformerConfig, parallel: ParallelConfig, name: str) -> Case:
    """Lay a case out and predict its memory, before anything is allocated."""
    run = RunConfig(
        model=config,
        device=work.device,
        parallel=parallel,
        precision=work.precision,
        data=DataConfig(synthetic=True, seq_length=work.seq_length),
        train=TrainConfig(
            steps=1,
            global_batch_size=work.microbatches * work.micro_batch_size,
            micro_batch_size=work.micro_batch_size,
        ),
    )
    validate_run(run)
    parts = language_model_parts(config, work.seq_length, precision=work.precision)
    layout = chosen_layout(parts, parallel, work.microbatches)
    where = layout.stage_map
    schedule = make_schedule(
        parallel.schedule,
        stages=where.stages,
        microbatches=work.microbatches,
        chunks=where.chunks,
        trainable=layout.trainable,
    )
    microbatch = Microbatch(
        seq_length=work.seq_length, size=work.micro_batch_size, dtype=work.precision.dtype
    )
    each = state_bytes(work.precision, parallel.data_parallel, 1).total
    peaks = predict_peak(
        layout,
        schedule,
        language_model_kept(config, microbatch),
        [count * each for count in layout.stage_parameters],
        microbatch.hidden_bytes(config),
    )
    return Case(name, run, layout, schedule, tuple(peak.total for peak in peaks))


def even_layout(layers: int, pieces: int) -> str:
    """Layers in equal numbers, as a layout string."""
    bounds = [layers * piece // pieces for piece in range(pieces + 1)]
    runs = ["t" * (stop - start) for start, stop in itertools.pairwise(bounds)]
    return f"E{'|'.join(runs)}L"


def make_cases(work: Work, config: TransformerConfig, stages: int) -> Iterator[Case]:
    """All schedules and layouts that are asked for."""
    for schedule in work.schedules:
        for kind in work.layouts:
            pieces = stage_map_for(schedule, stages).pieces
            layout = even_layout(work.layers, pieces) if kind == "even" else None
            parallel = ParallelConfig(pp=stages, schedule=schedule, layout=layout)
            yield make_case(work, config, parallel, f"{schedule}, {kind}")


class Run:
    """A model and its optimizer, as the trainer builds them, with the same samples in each step."""

    def __init__(self, case: Case, ctx: ParallelContext) -> None:
        config = case.config
        self.case, self.ctx, self.number = case, ctx, 0
        task = llama_task(config)
        task.validate(ctx, config.data)
        self.model = StagedModel(task, config, ctx, DTYPES[config.precision.dtype])
        parallel = self.model.data_parallel
        self.optimizer = OptimizerStep(
            parallel, self.model.sharing, ctx, config.optimizer, config.precision
        )
        initialize_parameters(parallel.parameters, seed=1)
        self.optimizer.adamw.refresh_master_from_parameters()
        size, length = config.train.micro_batch_size, config.data.seq_length
        shape = (case.schedule.microbatches, size, length + 1)
        tokens = torch.randint(
            config.model.vocab_size, shape, generator=torch.Generator().manual_seed(7)
        )
        mask = torch.ones(size, length, dtype=torch.bool)
        kept = self._pinned(mask)
        self.batches = [
            Batch(self._pinned(one[:, :-1]), self._pinned(one[:, 1:]), kept, i * size)
            for i, one in enumerate(tokens)
        ]
        self.count = tokens[..., 1:].numel()

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous()
        return whole.pin_memory() if self.ctx.device.type == "cuda" else whole

    def step(self, trace: StepTrace | None = None) -> torch.Tensor:
        """Run a step; returns the mean loss where it is computed, else 0, on the device."""
        weights = {"lm": torch.ones((), device=self.ctx.device) / self.count}
        sums = self.model.train(self.batches, weights, 1, self.number, trace)
        self.optimizer.step(1e-4, 0.1)
        self.number += 1
        return sums["loss/lm"] / self.count


def everyone(ctx: ParallelContext, mine: Any) -> list[Any]:
    """An object of every stage."""
    if ctx.world.size == 1:
        return [mine]
    found: list[Any] = [None] * ctx.world.size
    dist.all_gather_object(found, mine)
    return found


def measure(work: Work, case: Case, ctx: ParallelContext) -> Result:
    """Build a case, warm it up, trace a step and time some; collective over `ctx`."""
    run, cuda = Run(case, ctx), ctx.device.type == "cuda"
    loss = run.step().item()
    for _ in range(work.warmup - 1):
        run.step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    trace = StepTrace(ctx)
    begin = DeviceMark(ctx.device)
    run.step(trace)
    end = DeviceMark(ctx.device)
    timeline = trace.timeline()
    begin.wait()
    end.wait()
    start, stop = span_of(timeline)
    outside = max(everyone(ctx, 1e3 * end.seconds_since(begin))) - (stop - start)
    marks = [DeviceMark(ctx.device)]
    for _ in range(work.steps):
        run.step()
        marks.append(DeviceMark(ctx.device))
    for mark in marks:
        mark.wait()
    steps = [after.seconds_since(before) for before, after in itertools.pairwise(marks)]
    costs = Costs(
        work=measured_work(timeline, case.schedule),
        transfer=measured_transfer(timeline, case.schedule),
        receive_slots=RECEIVE_SLOTS,
    )
    simulated = simulate(case.schedule, costs)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return Result(
        case,
        1e3 * max(everyone(ctx, statistics.median(steps))),
        simulated.makespan + outside,
        bubble_of(timeline),
        simulated.bubble,
        tuple(everyone(ctx, peak)),
        sum(everyone(ctx, loss)),
        timeline,
    )


def free() -> None:
    """Give back what a case held: models and buffers refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def report(results: Sequence[Result], skipped: Sequence[str]) -> str:
    """The figures as text: rates first, then memory."""
    head = (
        "schedule, layout|tokens/s per GPU|of one GPU|step ms|predicted|off|bubble|simulated|loss"
    )
    speed = [head.split("|")]
    memory = [("peak GiB, stage by stage", "measured", "predicted", "off at most")]
    rates = {r.case.name: tokens_per_second(r) for r in results}
    one = next((rates[r.case.name] for r in results if len(r.timeline) == 1), None)
    for r in results:
        rate = rates[r.case.name]
        row = [r.case.name, f"{rate:,.0f}", f"{rate / one:.3f}" if one else "-"]
        row += [f"{r.step_ms:.1f}", f"{r.predicted_ms:.1f}"]
        row += [f"{r.predicted_ms / r.step_ms - 1:+.1%}"]
        row += [f"{r.bubble:.1%}", f"{r.simulated_bubble:.1%}", f"{r.loss:.5f}"]
        speed.append(row)
        predicted, measured = r.case.predicted_bytes, r.peak_bytes
        off = "-"
        if all(measured):
            ratios = [p / m - 1 for p, m in zip(predicted, measured, strict=True)]
            off = f"{max(ratios, key=abs):+.1%}"
        memory.append((r.case.name, gib(measured) if all(measured) else "-", gib(predicted), off))
    layouts = [f"{r.case.name}: {r.case.layout}" for r in results]
    return "\n\n".join(["\n".join(layouts), table(speed), table(memory), *skipped])


def tokens_per_second(result: Result) -> float:
    """Per GPU."""
    config = result.case.config
    tokens = config.train.global_batch_size * config.data.seq_length
    return tokens / result.step_ms * 1e3 / len(result.timeline)


def gib(sizes: Sequence[int]) -> str:
    """Sizes of all stages."""
    return " ".join(f"{size / GIB:.1f}" for size in sizes)


def limit_bytes(work: Work, ctx: ParallelContext) -> float:
    """What a case may be predicted to need, the same on all ranks."""
    if work.memory_gib is not None:
        return work.memory_gib * GIB
    own = float("inf")
    if ctx.device.type == "cuda":
        own = torch.cuda.get_device_properties(ctx.device).total_memory - 4 * GIB
    return min(everyone(ctx, own))


class Benchmark:
    """All cases one after the other, with what is known so far."""

    def __init__(self, work: Work, ctx: ParallelContext) -> None:
        self.work, self.ctx = work, ctx
        self.results: list[Result] = []
        self.skipped: list[str] = []

    def say(self, text: str) -> None:
        """A line of progress."""
        if self.ctx.world.rank == 0:
            print(text, flush=True)

    def run(self) -> None:
        """Measure all; a case that cannot fit is skipped. Collective over the world."""
        work, ctx = self.work, self.ctx
        config = dataclasses.replace(PRESETS[work.preset](), num_layers=work.layers)
        limit = limit_bytes(work, ctx)
        cases = list(make_cases(work, config, ctx.world.size))
        if work.one_gpu:
            cases.insert(0, make_case(work, config, ParallelConfig(), "one GPU"))
        for case in cases:
            need = gib(case.predicted_bytes)
            if max(case.predicted_bytes) > limit:
                self.skipped.append(f"{case.name}: skipped: predicted {need} GiB")
                self.say(self.skipped[-1])
                continue
            self.say(f"{case.name}: {case.layout}, predicted {need} GiB")
            alone = case.layout.stage_map.stages == 1
            result = None
            if not alone:
                result = measure(work, case, ctx)
            elif ctx.world.rank == 0:
                result = measure(work, case, ParallelContext.single(ctx.device))
            free()
            everyone(ctx, None)  # the others wait for the one that measures alone
            if result is not None:
                self._keep(result)

    def _keep(self, result: Result) -> None:
        self.results.append(result)
        rate, off = tokens_per_second(result), result.predicted_ms / result.step_ms - 1
        self.say(
            f"    {rate:,.0f} tokens/s per GPU, {result.step_ms:.1f} ms (predicted {off:+.1%}), "
            f"bubble {result.bubble:.1%}, peak {gib(result.peak_bytes)} GiB, loss {result.loss:.5f}"
        )
        if self.work.out is not None and self.ctx.world.rank == 0:
            self.work.out.mkdir(parents=True, exist_ok=True)
            name = result.case.name.replace(", ", "_").replace(" ", "_")
            write_trace(self.work.out / f"{name}.json", result.case.schedule.name, result.timeline)


@exit_on_user_error()
def main() -> None:
    work = tyro.cli(Work, description=__doc__)
    if work.preset not in PRESETS:
        raise ConfigError(f"there is no preset {work.preset}: {did_you_mean(work.preset, PRESETS)}")
    if work.warmup < 1 or work.steps < 1:
        raise ConfigError("--warmup and --steps must be at least 1")
    device = init_distributed(work.device)
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        raise ConfigError("a pipeline has at least 2 stages: start this with torchrun")
    ctx = ParallelContext.create(ParallelConfig(pp=size), device)
    benchmark = Benchmark(work, ctx)
    failed = False
    try:
        benchmark.run()
    except Exception:
        traceback.print_exc()
        failed = True
    if ctx.world.rank == 0:
        where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        print(
            f"\n{work.preset}, {work.layers} layers, sequence {work.seq_length}, "
            f"{work.microbatches} microbatches of {work.micro_batch_size}, "
            f"{work.precision.dtype}, on {size} x {where or 'CPU'}, torch {torch.__version__}, "
            f"Python {platform.python_version()}\n"
        )
        print(report(benchmark.results, benchmark.skipped), flush=True)
    if failed:
        os._exit(1)  # other ranks may wait in a collective: torchrun ends them
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    main()
