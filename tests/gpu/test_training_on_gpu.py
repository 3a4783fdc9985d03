"""Whole training steps on GPUs: against the CPU, over layouts, without host synchronisation, and
resumed."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.data_parallel.modes import make_data_parallel
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.distributed import WorkerPool
from core.testing.parity import check_copies_agree
from models.llama.model import build_llama

pytestmark = pytest.mark.gpu

MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=256,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=64,
    ffn_hidden_size=512,
    vocab_size=1003,
    max_position_embeddings=256,
    qkv_bias=True,
    qk_norm="rmsnorm",
    tie_embeddings=True,
    hidden_dropout=0.1,
)
MODELS = {
    "llama": MODEL,
    # Learned positions, biases and branches side by side.
    "gpt": dataclasses.replace(
        MODEL,
        position_embedding="learned",
        normalization="layernorm",
        activation="gelu_tanh",
        gated_mlp=False,
        attention_output_bias=True,
        mlp_bias=True,
        qk_norm="none",
        parallel_residual=True,
    ),
}


class _Run:
    def __init__(
        self, device: torch.device, dtype: str, config: ParallelConfig, model: str
    ) -> None:
        self.ctx = ctx = ParallelContext.create(config, device)
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.model = build_llama(MODELS[model], Placement(ctx, kind, device))
        self.parameters = declared_parameters(self.model)
        initialize_parameters(self.parameters, seed=1)
        sharing = publish_sharing(self.parameters, ctx)
        self.data_parallel = make_data_parallel([self.model], ctx, config)
        self.optimizer = OptimizerStep(
            self.data_parallel,
            sharing,
            ctx,
            OptimizerConfig(lr=1e-3),
            PrecisionConfig(dtype="bf16" if dtype == "bf16" else "fp32"),
        )
        tokens = torch.randint(0, 1003, (4, 129), generator=torch.Generator().manual_seed(0))
        self.tokens = tokens.to(device)

    def step(self, number: int) -> torch.Tensor:
        dp = self.ctx.dp
        size = 2 // dp.size
        total = torch.zeros((), device=self.ctx.device)
        self.data_parallel.begin_step(2)
        for i in range(2):
            sample = (i * dp.size + dp.rank) * size
            tokens = self.tokens[sample : sample + size]
            losses = self.model(tokens[:, :-1], tokens[:, 1:], DropoutKey(1, number, sample))
            loss = losses.sum() / (4 * 128)
            loss.backward()
            total += loss.detach()
        self.optimizer.step(1e-3, 0.1)
        return total


def _losses(device: str, dtype: str, config: ParallelConfig, model: str = "llama") -> list[float]:
    if device == "cuda" and torch.distributed.is_initialized():
        place = torch.device("cuda", torch.distributed.get_rank())
    else:
        place = torch.device(device)
    run = _Run(place, dtype, config, model)
    losses = torch.stack([run.step(number) for number in range(5)])
    if run.ctx.dp.group is not None:
        torch.distributed.all_reduce(losses, group=run.ctx.dp.group)
    run.data_parallel.wait_for_parameters()
    check_copies_agree(run.parameters, run.ctx)
    return [float(x) for x in losses]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return _losses("cpu", "fp32", ParallelConfig())


def _agree(actual: list[float], expected: list[float], tolerance: float) -> None:
    assert expected[-1] < expected[0]
    for a, b in zip(actual, expected, strict=True):
        assert abs(a - b) <= tolerance * abs(b), (actual, expected)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_one_gpu_trains_as_the_cpu(model: str, dtype: str, tolerance: float) -> None:
    on_cpu = _losses("cpu", "fp32", ParallelConfig(), model)
    _agree(_losses("cuda", dtype, ParallelConfig(), model), on_cpu, tolerance)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_never_waits_for_the_device(model: str) -> None:
    run = _Run(torch.device("cuda"), "bf16", ParallelConfig(), model)
    for number in range(3):
        run.step(number)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(3, 6):
            run.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "config",
    [
        ParallelConfig(tp=2),
        ParallelConfig(tp=2, sequence_parallel=True),
        ParallelConfig(),
        ParallelConfig(tp=4, sequence_parallel=True),
        ParallelConfig(tp=2, sequence_parallel=True, dp=2),
    ],
    ids=["tp2", "tp2-sp", "dp2", "tp4-sp", "tp2-sp-dp2"],
)
def test_layouts_train_as_the_cpu(
    pool: WorkerPool, expected: list[float], config: ParallelConfig
) -> None:
    size = config.tp * (config.dp or (2 if config.tp == 1 else 1))
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    for losses in pool.run(_losses, size, "cuda", "fp32", config, device="cuda"):
        _agree(losses, expected, 1e-4)


def _train(save: Path, steps: int, *more: str) -> list[dict[str, float]]:
    command = [
        *(sys.executable, "models/llama/train.py", "--preset", "tiny", "--data.synthetic"),
        *("--data.seq-length", "256", "--precision.dtype", "bf16", "--train.deterministic"),
        *("--train.steps", str(steps), "--train.global-batch-size", "8", "--save", str(save)),
        *("--train.micro-batch-size", "4", "--optimizer.lr-schedule", "constant", *more),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    lines = (save / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", 8)
    _train(tmp_path / "parts", 4)
    parts = _train(tmp_path / "parts", 8)
    assert [row["loss"] for row in parts] == [row["loss"] for row in whole]
    assert len(whole) == 8
