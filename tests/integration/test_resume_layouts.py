"""A run goes on at another layout: every bit of parameters and optimizer state is taken over, and
the losses are those of one undisturbed process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.optim.gradients import check_copies_agree
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerPool
from core.testing.parity import gather_fragments, gather_whole
from core.training.trainer import Trainer
from models.llama.train import llama_task

Dtype = Literal["fp32", "bf16"]
Layout = tuple[int, int]
STEPS_A_LEG = 3

MODEL = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=1,  # replicated at tp 2
    ffn_hidden_size=48,
    vocab_size=67,  # padded, and otherwise at every tp
    max_position_embeddings=64,
    qkv_bias=True,
    tie_embeddings=True,
    hidden_dropout=0.1,
)


@dataclass
class Leg:
    """Whole tensors by kind and name, before the first and after the last step of a leg."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]


def _config(save: Path, dtype: Dtype, tp: int, legs: int, leg: int) -> RunConfig[TransformerConfig]:
    return RunConfig(
        model=MODEL,
        save=str(save),
        device="cpu",
        parallel=ParallelConfig(tp=tp, sequence_parallel=tp > 1),
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, clip_grad=0.5),
        data=DataConfig(synthetic=True, seq_length=16, num_workers=0),
        train=TrainConfig(
            steps=legs * STEPS_A_LEG,
            global_batch_size=8,
            micro_batch_size=2,
            exit_at_step=(leg + 1) * STEPS_A_LEG,
        ),
    )


def _everything(trainer: Trainer, ctx: ParallelContext) -> dict[str, Tensor]:
    parameters = trainer.state.parameters
    trainer.state.data_parallel.wait_for_parameters()
    check_copies_agree(parameters, ctx)
    values = {n: d.parameter.data for n, d in parameters.items()}
    found = {"parameter": gather_whole(parameters, ctx, values)}
    states = list(trainer.optimizer.state_tensors())
    for kind in sorted({state.name for state in states}):
        pieces = ((state.fragment, state.tensor) for state in states if state.name == kind)
        found[kind] = gather_fragments(pieces, ctx)
    return {f"{kind} {name}": x for kind, whole in found.items() for name, x in whole.items()}


def _leg(config: RunConfig[TransformerConfig]) -> Leg:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(llama_task(config), config, ctx)
    start = _everything(trainer, ctx)
    trainer.fit()
    return Leg(start, _everything(trainer, ctx))


def _losses(save: Path) -> Tensor:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("fp32", [(2, 1), (1, 2), (2, 1)]),
        ("fp32", [(2, 2), (1, 1)]),
        ("bf16", [(2, 1), (1, 2)]),
    ],
    ids=str,
)
def test_a_run_goes_on_at_another_layout(
    tmp_path: Path, pool: WorkerPool, dtype: Dtype, layouts: list[Layout]
) -> None:
    before: Leg | None = None
    for number, (tp, dp) in enumerate(layouts):
        config = _config(tmp_path / "moved", dtype, tp, len(layouts), number)
        leg: Leg = pool.run(_leg, tp * dp, config)[0]
        kinds = {"parameter", "exp_avg", "exp_avg_sq"} | ({"master"} if dtype == "bf16" else set())
        assert {name.split()[0] for name in leg.start} == kinds
        if before is not None:
            assert leg.start.keys() == before.end.keys()
            changed = [name for name in leg.start if not leg.start[name].equal(before.end[name])]
            assert not changed
        before = leg
    whole = _config(tmp_path / "whole", dtype, 1, len(layouts), len(layouts) - 1)
    Trainer(llama_task(whole), whole, ParallelContext.single()).fit()
    losses, expected = _losses(tmp_path / "moved"), _losses(tmp_path / "whole")
    assert len(losses) == len(layouts) * STEPS_A_LEG
    tolerance = 1e-5 if dtype == "fp32" else 2e-2
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=0.0)


def test_losses_tell_whether_the_optimizer_was_taken_over(tmp_path: Path) -> None:
    """The comparison above sees moments that are lost."""
    losses = []
    for forget in (False, True):
        save = tmp_path / str(forget)
        for leg in range(2):
            config = _config(save, "fp32", 1, 2, leg)
            trainer = Trainer(llama_task(config), config, ParallelContext.single())
            for state in trainer.optimizer.state_tensors() if forget and leg else ():
                state.tensor.zero_()
            trainer.fit()
        losses.append(_losses(save))
    difference = (losses[0] / losses[1] - 1.0).abs()
    assert difference[: STEPS_A_LEG + 1].max() == 0.0
    assert difference[-1] > 1e-4
