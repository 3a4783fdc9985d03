import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.config.data import DataConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data.indexed_dataset import IndexedDatasetWriter
from core.data.loader import Batch
from core.errors import DataError
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.training.task import LossOutput, TrainTask
from core.transformer.language_model import LanguageModel
from models.llama.train import llama_task

MODEL = TransformerConfig(
    num_layers=1,
    hidden_size=16,
    num_attention_heads=2,
    ffn_hidden_size=24,
    vocab_size=11,
    max_position_embeddings=32,
)


def _task(**train: float) -> TrainTask:
    return llama_task(RunConfig(model=MODEL, train=TrainConfig(**train)))  # type: ignore[arg-type]


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 11, (2, 9), generator=generator)
    mask = torch.rand((2, 8), generator=generator) < 0.5
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_the_sum_over_counted_tokens(smoothing: float, training: bool) -> None:
    """Label smoothing in training alone, and no token that the mask leaves out."""
    task, batch = _task(label_smoothing=smoothing), _batch()
    ctx = ParallelContext.single()
    model = task.build_model(Placement(ctx, torch.float64, ctx.device))
    assert isinstance(model, LanguageModel)
    initialize_parameters(declared_parameters(model), seed=2)
    key = DropoutKey(0, 0, 0) if training else None
    with torch.no_grad():
        output = task.forward_step(model, batch, key, {})
        assert isinstance(output, LossOutput)
        found = output.losses
        logits = model.logits(batch.tokens)
    expected = F.cross_entropy(
        logits[batch.loss_mask],
        batch.labels[batch.loss_mask],
        label_smoothing=smoothing if training else 0.0,
        reduction="sum",
    )
    assert found.keys() == task.count(batch).keys()
    torch.testing.assert_close(found["lm"], expected)
    assert task.count(batch)["lm"] == int(batch.loss_mask.sum())
    assert math.isfinite(expected.item())


class _NoEnd:
    """A tokenizer without an end-of-document token."""

    @property
    def eod(self) -> int:
        raise DataError("this tokenizer has no end-of-document token")


def test_a_tokenizer_without_end_is_only_missed_where_it_is_needed(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        for _ in range(20):
            writer.add_document(np.arange(11, dtype=np.uint16))
        writer.finish()
    corpus = (str(tmp_path / "c"),)
    plain = DataConfig(train=corpus, seq_length=8, num_workers=0, split="1,0,0")
    train, _, _ = _task().make_datasets(plain, _NoEnd(), (4, 0, 0), 1)
    assert train is not None
    masked = DataConfig(
        train=corpus, seq_length=8, num_workers=0, split="1,0,0", mask_eod_loss=True
    )
    with pytest.raises(DataError, match="no end-of-document token"):
        _task().make_datasets(masked, _NoEnd(), (4, 0, 0), 1)


def test_parts_cost_what_the_run_makes_of_them() -> None:
    """Recompute and FP8 make the head, which has neither, dearer or cheaper beside a layer."""
    shares = []
    for granularity, fp8 in (("full", "none"), ("none", "none"), ("none", "current")):
        config = RunConfig(
            model=MODEL,
            parallel=ParallelConfig(recompute=RecomputeConfig(granularity=granularity)),  # type: ignore[arg-type]
            precision=PrecisionConfig(fp8=fp8),  # type: ignore[arg-type]
        )
        _, layer, head = llama_task(config).parts(DataConfig(seq_length=16))
        shares.append(head.work.total / layer.work.total)
    assert shares[0] < 0.8 * shares[1] < 0.8 * shares[2]
