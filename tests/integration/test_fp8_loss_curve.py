"""A small model learns in FP8 what it learns in bf16."""

from functools import lru_cache

import pytest
import torch

from core.backends.chosen import chosen_backend
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.data_parallel.modes import make_data_parallel
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from models.llama.model import build_llama

STEPS, BATCH, SEQUENCE, LR = 40, 8, 32, 3e-3
MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=128,
    vocab_size=67,
    max_position_embeddings=SEQUENCE,
)


@lru_cache(maxsize=1)
def _bf16() -> list[float]:
    return _losses(PrecisionConfig())


def _losses(precision: PrecisionConfig) -> list[float]:
    """Of each step, learning to count in steps of three."""
    ctx = ParallelContext.single()
    backend = chosen_backend("local", precision, ParallelConfig(), MODEL.num_layers)
    model = build_llama(MODEL, Placement(ctx, torch.bfloat16, ctx.device), None, backend)
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=0)
    sharing = publish_sharing(parameters, ctx)
    data_parallel = make_data_parallel([model], ctx, ParallelConfig())
    optimizer = OptimizerStep(data_parallel, sharing, ctx, OptimizerConfig(lr=LR), precision)
    losses = []
    for step in range(STEPS):
        start = torch.arange(BATCH)[:, None] + 7 * step
        text = (start + 3 * torch.arange(SEQUENCE + 1)) % MODEL.vocab_size
        data_parallel.begin_step(1)
        loss = model(text[:, :-1], text[:, 1:], None).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(LR, 0.1)
    return losses


@pytest.mark.parametrize("fp8", ["current", "rowwise"])
def test_fp8_learns_as_bf16_does(fp8: str) -> None:
    expected = _bf16()
    found = _losses(PrecisionConfig(fp8=fp8))  # type: ignore[arg-type]
    assert found != expected
    assert expected[-1] < 0.5 * expected[0]
    assert abs(sum(found) / sum(expected) - 1.0) < 0.02, (sum(found), sum(expected))
