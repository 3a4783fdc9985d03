"""A small decoder trained by a given backend at a given layout, for backends to be compared."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.backends.provider import BackendSpecProvider
from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.loader import Batch
from core.data_parallel.regions import DataParallel
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.random import Init
from core.testing.parity import gather_whole
from core.training.exchange import Exchange
from core.training.language_model_task import LanguageModelTask
from core.training.staged_model import StagedModel
from core.transformer.decoder import build_decoder


def no_weights(source: Path, config: TransformerConfig, parameters: Any) -> dict[str, Any]:
    """There are none to import."""
    raise AssertionError(f"{source}: these runs start from random weights")


@dataclass(frozen=True)
class BackendRun:
    """What is trained."""

    model: TransformerConfig
    backend: BackendSpecProvider
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig(dtype="fp64"))
    seq_length: int = 16
    samples: int = 8
    """Of a step, over all ranks."""
    microbatches: int = 4
    """Of a step, on each data-parallel rank."""
    steps: int = 3
    lr: float = 1e-2
    std: float = 0.2
    """Of all weights at the start, norms and biases included."""

    def task(self) -> LanguageModelTask:
        """The language model."""
        return LanguageModelTask(
            family="llama",
            model_config=self.model,
            build=build_decoder,
            importer=no_weights,
            recompute=self.parallel.recompute,
            backend=self.backend,
        )


@dataclass
class BackendOutcome:
    """What training gave."""

    losses: list[float]
    """Of every step, before its update."""
    parameters: dict[str, Tensor]
    """Whole, after the last step."""


def train_backend(run: BackendRun, device: str = "cpu") -> BackendOutcome:
    """Train at the layout of the initialised processes.

    Collective over all ranks.

    Raises:
        AssertionError: ranks that hold a parameter together differ.
    """
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    ctx = ParallelContext.create(run.parallel, place)
    size = run.samples // (ctx.dp.size * run.microbatches)
    config = RunConfig(
        model=run.model,
        parallel=run.parallel,
        data=DataConfig(synthetic=True, seq_length=run.seq_length),
        train=TrainConfig(micro_batch_size=size, steps=1),
    )
    dtype = {"fp64": torch.float64, "fp32": torch.float32}.get(run.precision.dtype, torch.bfloat16)
    model = StagedModel(run.task(), config, ctx, dtype)
    parameters = model.data_parallel.parameters
    initialize_parameters(
        {
            name: dataclasses.replace(d, init=Init("normal", run.std, mean=_mean(d.init)))
            for name, d in parameters.items()
        },
        seed=3,
    )
    optimizer = OptimizerStep(
        model.data_parallel, model.sharing, ctx, OptimizerConfig(lr=run.lr), run.precision
    )
    optimizer.adamw.refresh_master_from_parameters()
    losses = [_step(run, model, optimizer, ctx, size, step) for step in range(run.steps)]
    return BackendOutcome(losses, _whole(model.data_parallel, ctx))


def _mean(init: Init) -> float:
    return init.value if init.kind == "constant" else 0.0


def _step(
    run: BackendRun,
    model: StagedModel,
    optimizer: OptimizerStep,
    ctx: ParallelContext,
    size: int,
    step: int,
) -> float:
    generator = torch.Generator().manual_seed(step % 2)
    shape = (run.samples, run.seq_length + 1)
    tokens = torch.randint(0, run.model.vocab_size, shape, generator=generator)
    mask = torch.ones((size, run.seq_length), dtype=torch.bool)
    batches = []
    for i in range(run.microbatches):
        first = (i * ctx.dp.size + ctx.dp.rank) * size
        part = tokens[first : first + size]
        batches.append(Batch(part[:, :-1], part[:, 1:], mask, first))
    count = run.samples * run.seq_length
    sums = model.train(batches, {"lm": torch.tensor(1.0 / count, device=ctx.device)}, 5, step)
    total = Exchange(ctx, model.loss_stage).sum(False, (), [sums["loss/lm"]])[1]
    optimizer.step(run.lr, 0.1)
    return total.item() / count


def _whole(data_parallel: DataParallel, ctx: ParallelContext) -> dict[str, Tensor]:
    data_parallel.wait_for_parameters()
    parameters = data_parallel.parameters
    return gather_whole(parameters, ctx, {name: d.local for name, d in parameters.items()})
