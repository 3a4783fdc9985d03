"""A resumed run repeats the uninterrupted one, with the real model and memory that starts as
NaN."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.parallel.context import ParallelContext
from core.training.trainer import Trainer
from models.llama.train import llama_task

MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=48,
    vocab_size=67,  # padded to 72: padding must be zero in parameters and masters alike
    max_position_embeddings=64,
    hidden_dropout=0.1,
)


@pytest.fixture
def uninitialised_memory_is_nan() -> Iterator[None]:
    """In deterministic mode torch fills new memory with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def _losses(
    save: Path, precision: PrecisionConfig, exit_at_step: int | None = None
) -> list[dict[str, float]]:
    config: RunConfig[TransformerConfig] = RunConfig(
        model=MODEL,
        save=str(save),
        device="cpu",
        precision=precision,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=1),
        data=DataConfig(synthetic=True, seq_length=16, num_workers=0),
        train=TrainConfig(
            steps=6, global_batch_size=4, micro_batch_size=2, exit_at_step=exit_at_step
        ),
    )
    Trainer(llama_task(config), config, ParallelContext.single()).fit()
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in ("step", "loss", "grad_norm", "loss_scale")} for row in rows]


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize(
    "precision",
    [
        PrecisionConfig(dtype="fp32"),
        PrecisionConfig(dtype="bf16"),
        PrecisionConfig(dtype="fp16"),
        PrecisionConfig(dtype="bf16", master_weights="remainder", moments="bf16"),
    ],
    ids=["fp32", "bf16", "fp16", "lean"],
)
def test_resumed_twice_equals_uninterrupted(tmp_path: Path, precision: PrecisionConfig) -> None:
    whole = _losses(tmp_path / "whole", precision)
    for step in (2, 3, None):
        parts = _losses(tmp_path / "parts", precision, exit_at_step=step)
    assert len(whole) == 6
    assert parts == whole
    assert all(torch.isfinite(torch.tensor(row["grad_norm"])) for row in whole)
