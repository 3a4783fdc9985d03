"""A model of Transformer Engine's parts (a stand-in of the package, on the CPU) trains as a local
one in one process does, at every layout."""

from functools import cache
from typing import Any

import pytest
import torch

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.transformer import TransformerConfig
from core.testing.backend_run import BackendOutcome, BackendRun, train_backend
from core.testing.distributed import WorkerPool
from core.testing.fake_transformer_engine import installed
from core.testing.parity import assert_close

RICH = TransformerConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    ffn_hidden_size=40,
    vocab_size=67,
    max_position_embeddings=64,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    qk_norm="rmsnorm",
    sliding_window=5,
    sliding_window_layers=(1,),
    tie_embeddings=True,
    hidden_dropout=0.1,
)
LAYERNORM = TransformerConfig(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=40,
    vocab_size=67,
    max_position_embeddings=64,
    normalization="layernorm",
    gated_mlp=False,
    activation="gelu_tanh",
    mlp_bias=True,
    qkv_bias=True,
)


@cache
def _expected(model: TransformerConfig) -> BackendOutcome:
    return train_backend(BackendRun(model, LocalSpecProvider()))


def _engine(model: TransformerConfig, parallel: ParallelConfig) -> BackendSpecProvider:
    splits = parallel.schedule in ("zb_h1", "zbv")
    return TransformerEngineSpecProvider(model.num_layers, split_backward=splits)


def _on_rank(model: TransformerConfig, parallel: ParallelConfig) -> BackendOutcome:
    with installed():
        return train_backend(BackendRun(model, _engine(model, parallel), parallel))


def _compare(actual: BackendOutcome, expected: BackendOutcome, where: str) -> None:
    assert_close(torch.tensor(actual.losses), torch.tensor(expected.losses), 1e-9, where)
    assert actual.parameters.keys() == expected.parameters.keys()
    for name, values in expected.parameters.items():
        assert_close(actual.parameters[name], values, 1e-9, f"{name}, {where}")


@pytest.mark.parametrize("model", [RICH, LAYERNORM], ids=["rich", "layernorm"])
@pytest.mark.parametrize(
    "recompute",
    [
        RecomputeConfig(),
        RecomputeConfig(granularity="full", num_layers=2),
        RecomputeConfig(granularity="selective", modules=("core_attention", "mlp")),
    ],
    ids=lambda r: r.granularity,
)
def test_one_process(model: TransformerConfig, recompute: RecomputeConfig) -> None:
    parallel = ParallelConfig(recompute=recompute)
    _compare(_on_rank(model, parallel), _expected(model), f"{recompute}")


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"tp": 4, "sequence_parallel": True}),
    (2, {"data_parallel": "zero1"}),
    (2, {"pp": 2, "schedule": "zbv"}),
]
MORE: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (4, {"tp": 2, "sequence_parallel": True}),
    (2, {"data_parallel": "replicated", "overlap_grad_reduce": False}),
    (2, {"data_parallel": "fsdp2"}),
    (2, {"pp": 2, "schedule": "gpipe"}),
    (4, {"pp": 2, "tp": 2, "sequence_parallel": True, "schedule": "zb_h1"}),
]


@pytest.mark.parametrize(
    ("processes", "layout"),
    [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)],
    ids=str,
)
def test_layouts(pool: WorkerPool, processes: int, layout: dict[str, Any]) -> None:
    parallel = ParallelConfig(**layout)
    for model in (RICH, LAYERNORM):
        outcome = pool.run(_on_rank, processes, model, parallel)[0]
        _compare(outcome, _expected(model), f"{layout}")
