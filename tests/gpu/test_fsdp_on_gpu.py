"""Fully sharded parameters on GPUs, against ZeRO-1."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.data_parallel.modes import make_data_parallel, model_placement
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.distributed import WorkerPool
from core.testing.parity import check_copies_agree
from models.llama.model import build_llama

pytestmark = pytest.mark.multi_gpu

MODEL = TransformerConfig(
    num_layers=3,
    hidden_size=255,  # no number of rows can be divided by 2 ranks
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=64,
    ffn_hidden_size=510,
    vocab_size=1003,
    max_position_embeddings=256,
    qkv_bias=True,
    hidden_dropout=0.1,
)
RECOMPUTE = RecomputeConfig(granularity="full", num_layers=2)


def _losses(config: ParallelConfig) -> list[float]:
    device = torch.device("cuda", torch.distributed.get_rank())
    torch.cuda.set_device(device)
    ctx = ParallelContext.create(config, device)
    place = model_placement(ctx, config, torch.bfloat16)
    model = build_llama(MODEL, place, config.recompute)
    sharing = publish_sharing(declared_parameters(model), ctx)
    parallel = make_data_parallel([model], ctx, config, torch.bfloat16)
    initialize_parameters(parallel.parameters, seed=1)
    rates, precision = OptimizerConfig(lr=1e-3), PrecisionConfig(dtype="bf16")
    optimizer = OptimizerStep(parallel, sharing, ctx, rates, precision)
    optimizer.adamw.refresh_master_from_parameters()
    text = torch.randint(0, 1003, (8, 129), generator=torch.Generator().manual_seed(0)).to(device)
    sums = torch.zeros(5, device=device)
    for step in range(5):
        parallel.begin_step(2)
        for i in range(2):
            size = 4 // ctx.dp.size
            first = (i * ctx.dp.size + ctx.dp.rank) * size
            tokens = text[first : first + size]
            losses = model(tokens[:, :-1], tokens[:, 1:], DropoutKey(1, step, first))
            loss = losses.sum() / (8 * 128)
            loss.backward()
            sums[step] += loss.detach()
        optimizer.step(1e-3, 0.1)
    with torch.no_grad():
        model(text[:1, :-1], text[:1, 1:])
    parallel.wait_for_parameters()
    check_copies_agree(parallel.parameters, ctx)
    if config.data_parallel == "fsdp2":
        for declared in parallel.parameters.values():
            parameter = declared.parameter
            assert isinstance(parameter, DTensor)
            assert parameter.to_local().data_ptr() == declared.local.data_ptr()
    assert ctx.dp.group is not None
    torch.distributed.all_reduce(sums, group=ctx.dp.group)
    return sums.tolist()


@pytest.mark.parametrize(
    ("tp", "recompute"),
    [(1, RecomputeConfig()), (1, RECOMPUTE), (2, RecomputeConfig()), (2, RECOMPUTE)],
    ids=["dp2", "dp2-recompute", "tp2-sp-dp2", "tp2-sp-dp2-recompute"],
)
def test_fsdp2_trains_as_zero1(pool: WorkerPool, tp: int, recompute: RecomputeConfig) -> None:
    if torch.cuda.device_count() < 2 * tp:
        pytest.skip(f"needs {2 * tp} GPUs")
    found = {}
    for mode in ("zero1", "fsdp2"):
        config = ParallelConfig(
            tp=tp,
            sequence_parallel=tp > 1,
            data_parallel=mode,
            recompute=recompute,
        )
        found[mode] = pool.run(_losses, 2 * tp, config, device="cuda")[0]
    assert found["zero1"][-1] < found["zero1"][0]
    assert found["fsdp2"] == pytest.approx(found["zero1"], rel=1e-2)
