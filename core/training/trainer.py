"""The training loop of all models. It knows none of them: a `TrainTask` does.

One step, at every layout:

    all microbatches of the step lie on the host, and the global number of valid tokens of each loss
        on the device (both were got while the step before ran)
    forward and backward of every microbatch, each loss weighted by 1 / its global count
    gradient sum, norm, clip, update (`OptimizerStep`)
    one all-reduce: this step's losses, the next step's counts, and whether a rank was asked to stop

The host never waits for the device inside a step: what it reports and decides on is read one step
later. With several pipeline stages it waits for their messages.
"""

import gc
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.config.run import RunConfig
from core.config.train import validate_batch_sizes
from core.data.loader import BatchLoader
from core.errors import ConfigError, DataError
from core.optim.schedules import learning_rate, weight_decay
from core.optim.step import OptimizerStep, StepResult
from core.parallel.context import ParallelContext
from core.pipeline.trace import write_trace
from core.training.data_order import check_ranks_agree, sample_order
from core.training.datasets import make_datasets
from core.training.exchange import Exchange
from core.training.failure import SAVING, Patience, SentenceHandler, Watchdog
from core.training.interrupts import StopRequest
from core.training.metrics import Console, Reporter, Throughput, open_trackers
from core.training.opening import describe_run
from core.training.runtime import controlled_garbage_collection, use_deterministic_kernels
from core.training.saved_state import ModuleState
from core.training.staged_model import StagedModel
from core.training.state import RunState
from core.training.step_reports import PendingReport, StepReports, late_values, mean_losses
from core.training.step_trace import TRACE_FILE, StepTrace
from core.training.task import TrainTask

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

_LAST_SAVE_SECONDS = 5.0
"""How long a run that fails goes on with the checkpoint that it has begun: not long, as another
rank may be dead and never do its part."""


@dataclass(frozen=True)
class StepData:
    """What a step is computed from, on the host."""

    batches: Sequence[Any]
    """This rank's microbatches."""
    samples: int
    """Of all ranks."""
    names: tuple[str, ...]
    """Of the losses."""
    counts: tuple[int, ...]
    """Valid tokens of each loss in these microbatches."""


class Trainer:
    """Builds model, optimizer and loaders from a configuration, and trains.

    Usable without a command line: `Trainer(task, config, ParallelContext.single()).fit()`.
    """

    def __init__(
        self,
        task: TrainTask,
        config: RunConfig[Any],
        ctx: ParallelContext,
        *,
        datasets: Sequence[Any] | None = None,
        failures: SentenceHandler | None = None,
    ) -> None:
        """Build everything and fill it from a checkpoint, Hugging Face weights or a seed.

        Collective over the world.

        Args:
            task: the model family.
            config: everything else; validated by the caller.
            ctx: the process axes and this rank's device.
            datasets: training and validation set, if they are built already: it may take long, and
                is best done before a process group exists.
            failures: where a hang is reported.

        Raises:
            ConfigError: the architecture does not fit the layout or the data.
            CheckpointError, ConversionError: see `RunState.start`.
            DataError: there is no training data.
        """
        self.task, self.config, self.ctx = task, config, ctx
        train = config.train
        self._stop = StopRequest(train.exit_duration_minutes)
        if train.deterministic:
            use_deterministic_kernels()
        validate_batch_sizes(train, ctx.dp.size)
        task.validate(ctx, config.data)
        dtype = DTYPES[config.precision.dtype]
        self.model = StagedModel(task, config, ctx, dtype)
        # By now all process groups exist.
        self._watchdog = Watchdog(
            Patience(train.hang_timeout_seconds, train.sigterm_grace_seconds),
            failures or SentenceHandler(),
            self._stop,
            ctx.describe_groups(),
            waiting=self.model.waiting,
        )
        parallel, sharing = self.model.data_parallel, self.model.sharing
        self.optimizer = OptimizerStep(
            parallel, sharing, ctx, config.optimizer, config.precision, train.seed
        )
        console = Console(enabled=ctx.world.rank == 0, total_steps=train.steps)
        throughput = Throughput.of(task, config.data.seq_length, ctx, dtype)
        self._reporter = Reporter(console, throughput, ctx.device)
        modules = ModuleState(self.model.chunks, ctx)
        self.state = RunState(task, config, ctx, parallel, self.optimizer, modules)
        start = self.state.start()
        self._reports = StepReports(
            config, self.state.position, self._reporter, self.optimizer.loss_scale.minimum
        )
        self._exchange = Exchange(ctx, self.model.loss_stage)
        train_data, valid_data = (datasets or make_datasets(task, config))[:2]
        if train_data is None:
            raise DataError("there is no training data: name some with --data.train")
        self.state.sample_order = sample_order(train_data, train.seed)
        check_ranks_agree(config, self.state.sample_order, ctx)
        self._train_loader = self._loader(train_data, growing=True)
        self._valid_loader = None if valid_data is None else self._loader(valid_data, growing=False)
        for line in describe_run(task, config, ctx, self.model, dtype):
            console.say(line)
        valid = 0 if valid_data is None else len(valid_data)
        console.say(f"data: {len(train_data):,} training samples, {valid:,} validation samples")
        console.say(start)

    # ---- The loop --------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Train up to the last step, or until the run is asked to stop; evaluate and save.

        SIGTERM, Ctrl-C and a time limit end the run at a step border that all ranks agree on.

        Returns:
            Whether all steps are done.

        Raises:
            ConfigError: the checkpoint of --load is of the last step or beyond it.
            TrainingError: too many steps in a row were skipped.
            CheckpointError: a checkpoint could not be written.
            DataError: damaged data.
        """
        train, position = self.config.train, self.state.position
        if position.step >= (train.exit_at_step or train.steps):
            if self.state.is_of_another_folder:  # nothing would be in --save
                raise ConfigError(
                    f"the checkpoint in --load {self.config.load} is of step {position.step}, from "
                    "which this run goes on, but it is to end at step "
                    f"{train.exit_at_step or train.steps}: raise --train.steps, which counts the "
                    "steps before; to begin at step 0 with these weights, give --init-from in "
                    "place of --load"
                )
            self._reporter.console.say(f"nothing to do: step {position.step} is the last")
            return position.step >= train.steps
        self.state.write_companions()
        self.state.prepare_saving()
        if self.ctx.world.rank == 0:
            first_step = position.step
            self._reporter.trackers = open_trackers(self.task.family, self.config, first_step)
        with self._stop, controlled_garbage_collection(train.gc_interval):
            self._watchdog.start()
            self._reporter.start(position.step)
            try:
                done = self._train()
                self.state.close_saving()
                return done
            except Exception:
                # What was saved last is nearly a checkpoint. The watchdog still looks: if another
                # rank has failed, it does not wait that long.
                self.state.close_saving(_LAST_SAVE_SECONDS)
                raise
            finally:
                self._watchdog.stop()
                self._reporter.close()
                for loader in (self._train_loader, self._valid_loader):
                    if loader is not None:
                        loader.close()

    def _train(self) -> bool:
        train, position = self.config.train, self.state.position
        data = self._fetch_training()
        counts = self._exchange.sum(False, data.counts)[1:]
        while True:
            self._watchdog.beat(position.step + 1, "training")
            rate = learning_rate(self.config.optimizer, position.step, train.steps)
            sums, result = self._step(data, counts, rate)
            position.step += 1
            position.consumed_samples += data.samples
            last = position.step == train.steps
            # Loading, counting and the all-reduce lie behind what the device still computes.
            following = data if last else self._fetch_training()
            stop = self._stop.reason is not None
            summed = self._exchange.sum(stop, following.counts, list(sums.values()))
            over_all = dict(zip(sums, summed[1 + len(counts) :], strict=True))
            counted = dict(zip(data.names, counts, strict=True))
            late = late_values(summed[0], counted, over_all, result)
            stopping = self._reports.push(
                PendingReport(
                    position.step, position.consumed_samples, data.samples, rate, data.names, late
                )
            )
            data, counts = following, summed[1 : 1 + len(counts)]
            stopping = self._border(last=last, stopping=stopping)
            if last or stopping:
                return last

    def _step(
        self, data: StepData, counts: Tensor, rate: float
    ) -> tuple[dict[str, Tensor], StepResult]:
        """Forward, backward and update; returns this rank's sums of losses and metrics."""
        position, train = self.state.position, self.config.train
        weights = torch.where(counts > 0, self.optimizer.loss_scale.scale / counts, 0.0)
        named = dict(zip(data.names, weights, strict=True))
        trace = StepTrace(self.ctx) if position.step + 1 == train.trace_step else None
        sums = self.model.train(data.batches, named, train.seed, position.step, trace)
        decay = weight_decay(self.config.optimizer, position.step, train.steps)
        result = self.optimizer.step(rate, decay, valid=counts.sum() > 0)
        if trace is not None:
            self._write_trace(trace, len(data.batches))
        return sums, result

    def _write_trace(self, trace: StepTrace, microbatches: int) -> None:
        """Leave a measured step in --save; collective over pp, and waits for the device."""
        timeline, schedule = trace.timeline(), self.model.schedule(microbatches)
        if self.ctx.world.rank or self.config.save is None:
            return
        path, where = Path(self.config.save) / TRACE_FILE, schedule.stage_map
        layout = str(self.model.layout).replace(" ", "")
        write_trace(path, schedule.name, timeline)
        self._reporter.console.say(
            f"step {self.config.train.trace_step} is in {path}: draw it with python -m "
            f"core.pipeline show --schedule {schedule.name} --stages {where.stages} --chunks "
            f"{where.chunks} --layout '{layout}' --microbatches {microbatches} --from-trace "
            f"{shlex.quote(str(path))} --out step.png"
        )

    def _fetch_training(self) -> StepData:
        consumed = self.state.position.consumed_samples
        return self._fetch(
            self._train_loader, consumed, self.config.train.global_batch_size_at(consumed)
        )

    def _fetch(self, loader: BatchLoader, consumed: int, samples: int) -> StepData:
        batches = loader.fetch(consumed, self._microbatches(samples))
        counted = [self.task.count(batch) for batch in batches]
        names = tuple(counted[0])
        counts = tuple(sum(count[name] for count in counted) for name in names)
        return StepData(batches, samples, names, counts)

    def _microbatches(self, samples: int) -> int:
        return samples // (self.config.train.micro_batch_size * self.ctx.dp.size)

    # ---- Between steps ---------------------------------------------------------------------------

    def _border(self, *, last: bool, stopping: bool) -> bool:
        """Evaluate and save where it is time; returns whether the run stops here."""
        train, step = self.config.train, self.state.position.step
        self.state.poll_saving()
        evaluates = train.eval_interval and (last or step % train.eval_interval == 0)
        saves = train.save_interval and step % train.save_interval == 0
        exits = step == train.exit_at_step
        if evaluates or saves or last or stopping or exits:
            stopping = self._reports.flush() or stopping
        if evaluates and not stopping:
            losses = self.evaluate()
            stopping = losses is None
            if losses is not None:
                self._reporter.evaluation(step, losses)
            else:
                self._reporter.console.say(
                    f"step {step} | the evaluation is left out: asked to stop"
                )
        stopping = stopping or exits
        if saves or last or stopping:
            path = self._save(wait=last or stopping)
            if stopping:
                asked = "--train.exit-at-step" if exits else "another rank was asked to"
                reason = self._stop.reason or asked
                where = "" if path is None else f", saved {path}"
                self._reporter.console.say(f"stopping at step {step} ({reason}){where}")
        if train.gc_interval and step % train.gc_interval == 0:
            gc.collect()
        return stopping

    def _save(self, *, wait: bool) -> Path | None:
        """Save this step unless that is done; returns its directory."""
        step, begin = self.state.position.step, time.perf_counter()
        self._watchdog.beat(step, "saving, while the save before is still being written")
        self.state.finish_saving()
        self._watchdog.beat(step, SAVING)
        path = self.state.save()
        if wait:
            self.state.finish_saving()
        if path is not None:
            self._reporter.saved(path.name, time.perf_counter() - begin)
        self._reporter.pause_over()
        return path

    def evaluate(self) -> dict[str, float] | None:
        """Loss on the first samples of the validation set, each valid token counting once.

        Collective over the world: one all-reduce per global batch.

        Returns:
            `loss` and, if there are several, each by name; None if a rank was asked to stop.

        Raises:
            DataError: there is no validation data.
        """
        if self._valid_loader is None:
            raise DataError("there is no validation data: name some with --data.valid")
        train = self.config.train
        totals: dict[str, float] = {}
        names: tuple[str, ...] = ()
        for step in range(train.eval_steps):
            self._watchdog.beat(self.state.position.step, "evaluation")
            samples = train.global_batch_size
            data = self._fetch(self._valid_loader, step * samples, samples)
            names = data.names
            scalars = self.model.evaluate(data.batches, names)
            stop = self._stop.reason is not None
            summed = self._exchange.sum(stop, data.counts, [scalars[f"loss/{n}"] for n in names])
            keys = ["stop", *(f"count/{n}" for n in names), *(f"loss/{n}" for n in names)]
            for key, value in zip(keys, summed.tolist(), strict=True):
                totals[key] = totals.get(key, 0.0) + value
            if totals["stop"]:
                break
        self._reporter.pause_over()
        return None if totals["stop"] else mean_losses(totals, names)

    # ---- Parts -----------------------------------------------------------------------------------

    def _loader(self, dataset: Any, *, growing: bool) -> BatchLoader:
        def microbatches_at(consumed: int) -> int:
            return self._microbatches(self.config.train.global_batch_size_at(consumed))

        return BatchLoader(
            dataset,
            dp_rank=self.ctx.dp.rank,
            dp_size=self.ctx.dp.size,
            microbatch_size=self.config.train.micro_batch_size,
            num_workers=self.config.data.num_workers,
            prefetch=self.config.data.prefetch,
            pin_memory=self.ctx.device.type == "cuda",
            num_microbatches_at=microbatches_at if growing else None,
        )
