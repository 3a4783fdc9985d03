"""Documents packed into rows give the loss and every gradient of the same documents apart, at every
layout."""

import dataclasses

import pytest
import torch
from torch import Tensor

from core.config.data import DataConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.loader import Batch
from core.optim.gradients import ReplicaGradients
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.random import Init
from core.testing.distributed import WorkerPool
from core.testing.parity import assert_close, gather_regions
from core.training.exchange import Exchange
from core.training.staged_model import StagedModel
from models.llama.train import llama_task

SEQUENCE = 16
ROWS = ((5, 7, 4), (16,), (1, 14, 1), (9, 7))
MODEL = TransformerConfig(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    ffn_hidden_size=40,
    vocab_size=67,
    max_position_embeddings=64,
    qk_norm="rmsnorm",
    qkv_bias=True,
    sliding_window=5,
    sliding_window_layers=(1, 2),
    tie_embeddings=True,
)


def _documents() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels and loss mask of every document."""
    generator = torch.Generator().manual_seed(8)
    found = []
    for length in (length for row in ROWS for length in row):
        tokens = torch.randint(67, (length + 1,), generator=generator)
        found.append((tokens[:-1], tokens[1:], torch.rand(length, generator=generator) < 0.7))
    return found


def _packed() -> list[Batch]:
    """Two microbatches of two rows."""
    documents = iter(_documents())
    rows = [[next(documents) for _ in row] for row in ROWS]
    tokens, labels, mask = (
        torch.stack([torch.cat([document[i] for document in row]) for row in rows])
        for i in range(3)
    )
    bounds = torch.full((len(ROWS), 5), SEQUENCE, dtype=torch.int32)
    for row, lengths in enumerate(ROWS):
        bounds[row, : len(lengths)] = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return [
        Batch(tokens[at], labels[at], mask[at], at.start, bounds[at])
        for at in (slice(0, 2), slice(2, 4))
    ]


def _apart() -> list[Batch]:
    """A row for each document, padded."""
    documents = _documents()
    shape = (len(documents), SEQUENCE)
    tokens, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (text, following, counted) in enumerate(documents):
        tokens[row, : len(text)] = text
        labels[row, : len(text)] = following
        mask[row, : len(text)] = counted
    return [Batch(tokens, labels, mask, 0)]


def _outcome(batches: list[Batch], parallel: ParallelConfig) -> tuple[Tensor, dict[str, Tensor]]:
    ctx = ParallelContext.create(parallel, torch.device("cpu"))
    config = RunConfig(
        model=MODEL,
        parallel=parallel,
        data=DataConfig(train=("corpus",), seq_length=SEQUENCE, reset_attention_mask=True),
        train=TrainConfig(micro_batch_size=len(batches[0].tokens), steps=1),
    )
    model = StagedModel(llama_task(config), config, ctx, torch.float64)
    initialize_parameters(
        {
            name: dataclasses.replace(d, init=Init("normal", 0.2, mean=d.init.value % 1.5))
            for name, d in model.data_parallel.parameters.items()
        },
        seed=3,
    )
    count = sum(int(batch.loss_mask.sum()) for batch in _packed())
    own = batches if len(batches) == 1 else batches[ctx.dp.rank :: ctx.dp.size]
    sums = model.train(own, {"lm": torch.tensor(1.0 / count, dtype=torch.float64)}, 5, 0)
    loss = Exchange(ctx, model.loss_stage).sum(False, (), [sums["loss/lm"]])[1] / count
    parallel_state = model.data_parallel
    parallel_state.finish()
    ReplicaGradients(
        parallel_state.regions, parallel_state.counted, model.sharing, ctx
    ).reduce_partial()
    return loss, gather_regions(parallel_state, ctx)


LAYOUTS = {
    "one process": ParallelConfig(),
    "full recompute": ParallelConfig(recompute=RecomputeConfig(granularity="full")),
    "attention recomputed": ParallelConfig(
        recompute=RecomputeConfig(granularity="selective", modules=("core_attention",))
    ),
    "tp 2": ParallelConfig(tp=2),
    "tp 2, sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp 2": ParallelConfig(pp=2),
    "tp 2, sp, pp 2": ParallelConfig(tp=2, sequence_parallel=True, pp=2, schedule="zb_h1"),
    "dp 2": ParallelConfig(dp=2),
}


def _on_rank(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    return _outcome(_packed(), LAYOUTS[name])


@pytest.fixture(scope="module")
def apart() -> tuple[Tensor, dict[str, Tensor]]:
    return _outcome(_apart(), ParallelConfig())


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_equals_apart(
    pool: WorkerPool, apart: tuple[Tensor, dict[str, Tensor]], name: str
) -> None:
    layout = LAYOUTS[name]
    size = layout.tp * layout.pp * (layout.dp or 1)
    loss, gradients = pool.run(_on_rank, size, name)[0] if size > 1 else _on_rank(name)
    assert_close(loss, apart[0], 1e-9, "loss")
    assert gradients.keys() == apart[1].keys()
    for parameter, expected in apart[1].items():
        assert expected.abs().max() > 1e-9
        assert_close(gradients[parameter], expected, 1e-9, f"gradient of {parameter}")


def test_without_bounds_documents_see_each_other(apart: tuple[Tensor, dict[str, Tensor]]) -> None:
    batches = [dataclasses.replace(batch, cu_seqlens=None) for batch in _packed()]
    loss, _ = _outcome(batches, ParallelConfig())
    assert abs(float(loss - apart[0])) > 1e-4
