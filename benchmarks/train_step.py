"""Speed of a training step of a decoder-only model, with the parts that the trainer uses and
random tokens.

One GPU: `python benchmarks/train_step.py`; several: `torchrun --nproc-per-node 4
benchmarks/train_step.py --parallel.tp 4 --parallel.sequence-parallel`. The default work is 8
layers of Llama-3-8B, vocabulary 128256, sequence 8192, 4 microbatches of one sample.
"""

import dataclasses
import itertools
import os
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from core.backends.chosen import chosen_backend
from core.config.backend import Backend, BackendUse, validate_backend
from core.config.loading import exit_on_user_error
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, validate_parallel
from core.config.precision import PrecisionConfig, validate_fp8, validate_precision
from core.config.transformer import TransformerConfig
from core.data_parallel.modes import make_data_parallel, model_placement
from core.kernels.chosen_attention import chosen_kernel
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.random import DropoutKey, make_key, philox
from core.parallel.rendezvous import init_distributed
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from core.training.trainer import DTYPES
from core.transformer.decoder import build_decoder
from core.transformer.language_model import LanguageModel
from models.registry import family_for_preset

DENSE_BF16_PEAK = 989.4
"""TFLOP/s of an H100 or H200 without sparsity, by the vendor's datasheet."""


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
    microbatches: int = 4
    """Microbatches per step and data-parallel rank."""
    warmup: int = 5
    """Steps before the clock starts."""
    steps: int = 15
    """Steps measured."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    backend: Backend = "local"
    """What supplies the layers' parts."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    profile: Path | None = None
    """Write a table of the kernels of one step here."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout."""


def random_tokens(
    shape: tuple[int, int], vocab_size: int, device: torch.device, *place: int
) -> Tensor:
    """Random tokens `[b, s + 1]` of a microbatch, by its `place`: step, number in the step and
    data-parallel rank. They are the same at every tensor-parallel layout.
    """
    index = torch.arange(shape[0] * shape[1], device=device).view(shape)
    return philox(make_key(7, *place), index)[0] % vocab_size


class Step:
    """One optimizer step over random tokens that are the same at every tensor-parallel layout."""

    def __init__(self, work: Work, config: TransformerConfig, ctx: ParallelContext) -> None:
        self.work, self.config, self.ctx = work, config, ctx
        dtype = DTYPES[work.precision.dtype]
        place = model_placement(ctx, work.parallel, dtype)
        backend = chosen_backend(work.backend, work.precision, work.parallel, config.num_layers)
        self.model: LanguageModel = build_decoder(config, place, work.parallel.recompute, backend)
        sharing = publish_sharing(declared_parameters(self.model), ctx)
        self.data_parallel = make_data_parallel([self.model], ctx, work.parallel, dtype)
        self.optimizer = OptimizerStep(
            self.data_parallel, sharing, ctx, OptimizerConfig(lr=1e-4), work.precision
        )
        initialize_parameters(self.data_parallel.parameters, seed=1)
        self.optimizer.adamw.refresh_master_from_parameters()
        self.number = 0

    def tokens(self, microbatch: int) -> Tensor:
        """`[b, s + 1]` random tokens."""
        shape = (self.work.micro_batch_size, self.work.seq_length + 1)
        place = (self.number, microbatch, self.ctx.dp.rank)
        return random_tokens(shape, self.config.vocab_size, self.ctx.device, *place)

    def __call__(self) -> Tensor:
        """Run a step; returns the mean loss of this data-parallel rank, on the device."""
        work = self.work
        count = work.microbatches * work.micro_batch_size * work.seq_length * self.ctx.dp.size
        total = torch.zeros((), device=self.ctx.device)
        self.data_parallel.begin_step(work.microbatches)
        for i in range(work.microbatches):
            tokens = self.tokens(i)
            key = DropoutKey(1, self.number, i)
            loss = self.model(tokens[:, :-1], tokens[:, 1:], key).sum() / count
            loss.backward()
            total += loss.detach()
        self.optimizer.step(1e-4, 0.1)
        self.number += 1
        return total * self.ctx.dp.size


def measure(step: Step, work: Work) -> tuple[list[float], float]:
    """Seconds of each measured step, and the loss of the very first."""
    cuda = step.ctx.device.type == "cuda"
    first = step().item()
    for _ in range(work.warmup - 1):
        step()
    seconds = []
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(work.steps + 1)]
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize()
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    else:
        for _ in range(work.steps):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    return seconds, first


def report(step: Step, work: Work, seconds: list[float], first: float) -> str:
    """The figures as text."""
    ctx, config = step.ctx, step.config
    tokens = work.microbatches * work.micro_batch_size * work.seq_length * ctx.dp.size
    median = statistics.median(seconds)
    rate = tokens / median / ctx.world.size
    lines = [
        f"{work.preset}, {config.num_layers} layers, vocabulary {config.vocab_size}, sequence "
        f"{work.seq_length}, {work.microbatches} x {work.micro_batch_size}, "
        f"{work.precision.dtype}; tp {ctx.tp.size}, sequence parallel {ctx.sequence_parallel}, "
        f"overlap {ctx.tp_overlap}, dp {ctx.dp.size} {work.parallel.data_parallel}",
        f"backend             {work.backend}, fp8 {work.precision.fp8}",
        f"master weights      {work.precision.master_weights}, moments {work.precision.moments}",
        f"first loss          {first:.5f}",
        f"step                {median * 1e3:.1f} ms (fastest {min(seconds) * 1e3:.1f}, slowest "
        f"{max(seconds) * 1e3:.1f})",
        f"tokens/s per GPU    {rate:,.0f}",
    ]
    for causal in (True, False):
        achieved = rate * config.flops_per_token(work.seq_length, causal=causal) / 1e12
        name = "causal" if causal else "full"
        lines.append(
            f"TFLOP/s, {name:6} att. {achieved:.1f} ({achieved / DENSE_BF16_PEAK:.1%} of "
            f"{DENSE_BF16_PEAK})"
        )
    if ctx.device.type == "cuda":
        name = torch.cuda.get_device_name()
        heads = config.num_attention_heads // ctx.tp.size
        groups = max(1, config.kv_heads // ctx.tp.size)
        shape = (work.seq_length, work.micro_batch_size, heads, config.kv_channels)
        kernel = chosen_kernel(shape, groups, torch.bfloat16)
        lines += [
            f"peak memory         {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB",
            f"attention           {kernel if work.backend == 'local' else work.backend}",
            f"on                  {name}, torch {torch.__version__}, Python "
            f"{platform.python_version()}",
        ]
    return "\n".join(lines)


def profile(step: Step, path: Path) -> None:
    """Write the time of each kernel in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    averages = profiler.key_averages()
    path.write_text(
        averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    )


@exit_on_user_error()
def main() -> None:
    work = tyro.cli(Work, description=__doc__)
    validate_parallel(work.parallel)
    validate_precision(work.precision)
    validate_backend(BackendUse(work.backend, work.precision, work.parallel, work.device))
    device = init_distributed(work.device)
    ctx = ParallelContext.create(work.parallel, device)
    config = dataclasses.replace(
        family_for_preset(work.preset).presets()[work.preset](), num_layers=work.layers
    )
    validate_fp8(work.precision, config, work.parallel, work.seq_length * work.micro_batch_size)
    step = Step(work, config, ctx)
    seconds, first = measure(step, work)
    text = report(step, work, seconds, first)
    if ctx.world.rank == 0:
        print(text, flush=True)
        if work.profile is not None:
            profile(step, work.profile)
    elif work.profile is not None:
        step()
    if ctx.world.size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    main()
