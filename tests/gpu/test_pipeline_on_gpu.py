"""Pipeline schedules over two and four GPUs, against one process on the CPU."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.loader import Batch
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.testing.distributed import WorkerPool
from core.training.exchange import Exchange
from core.training.staged_model import StagedModel
from models.llama.train import llama_task

pytestmark = pytest.mark.multi_gpu

MICROBATCHES, SIZE, LENGTH = 8, 2, 128
MODEL = TransformerConfig(
    num_layers=8,
    hidden_size=256,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=64,
    ffn_hidden_size=512,
    vocab_size=1003,
    max_position_embeddings=256,
    qkv_bias=True,
    tie_embeddings=True,
    hidden_dropout=0.1,
)


def _batches(device: torch.device) -> list[Batch]:
    shape = (MICROBATCHES, SIZE, LENGTH + 1)
    tokens = torch.randint(0, 1003, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(SIZE, LENGTH, dtype=torch.bool)

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous()
        return whole.pin_memory() if device.type == "cuda" else whole

    kept = pinned(mask)
    return [
        Batch(pinned(one[:, :-1]), pinned(one[:, 1:]), kept, i * SIZE)
        for i, one in enumerate(tokens)
    ]


def _losses(kind: Literal["cuda", "cpu"], parallel: ParallelConfig) -> list[float]:
    """Mean losses of three training steps and of two evaluations after them."""
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, torch.cuda.current_device())
    ctx = ParallelContext.create(parallel, device)
    config = RunConfig(
        model=MODEL,
        device=kind,
        parallel=parallel,
        precision=PrecisionConfig(dtype="fp32"),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(synthetic=True, seq_length=LENGTH),
        train=TrainConfig(steps=3, global_batch_size=MICROBATCHES * SIZE, micro_batch_size=SIZE),
    )
    model = StagedModel(llama_task(config), config, ctx, torch.float32)
    optimizer = OptimizerStep(
        model.data_parallel, model.sharing, ctx, config.optimizer, config.precision
    )
    initialize_parameters(model.data_parallel.parameters, seed=1)
    batches, exchange = _batches(device), Exchange(ctx, model.loss_stage)
    count = MICROBATCHES * SIZE * LENGTH
    weights = {"lm": torch.ones((), device=device) / count}
    losses = []
    for step in range(3):
        losses.append(model.train(batches, weights, 1, step)["loss/lm"])
        optimizer.step(1e-3, 0.1)
    losses += [model.evaluate(batches, ("lm",))["loss/lm"] for _ in range(2)]
    summed: list[float] = (exchange.sum(False, (), losses)[1:] / count).tolist()
    return summed


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return _losses("cpu", ParallelConfig())


@pytest.fixture(scope="module")
def fresh_pool() -> Iterator[WorkerPool]:
    """Processes that have loaded no kernel yet: what loads while a receive waits is the danger."""
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb_h1", "zbv"])
@pytest.mark.parametrize("stages", [2, 4])
def test_stages_train_as_one_process(
    fresh_pool: WorkerPool,
    expected: list[float],
    stages: int,
    schedule: Literal["1f1b", "interleaved", "zb_h1", "zbv"],
) -> None:
    if torch.cuda.device_count() < stages:
        pytest.skip(f"needs {stages} GPUs")
    parallel = ParallelConfig(pp=stages, schedule=schedule)
    found = fresh_pool.run(_losses, stages, "cuda", parallel, timeout=120.0, device="cuda")
    assert expected[2] < expected[0]
    for losses in found:
        assert losses == pytest.approx(expected, rel=1e-4)
        # Twice the same evaluation.
        assert losses[3] == pytest.approx(losses[4], rel=1e-6)
