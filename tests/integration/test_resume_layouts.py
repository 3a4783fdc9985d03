"""A run goes on at another layout: every bit of parameters and optimizer state is taken over, and
the losses are those of one undisturbed process."""

import dataclasses
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
from core.optim.rounding import join_master, round_master
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerPool
from core.testing.parity import check_copies_agree, gather_fragments, gather_whole
from core.training.trainer import Trainer
from models.llama.train import llama_task

Mode = Literal["fp32", "bf16", "lean"]
Layout = tuple[int, int] | tuple[int, int, int] | tuple[int, int, int, str]
"""tp, dp, pp, and one of `PIPELINES`."""
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


PIPELINES: dict[str, ParallelConfig] = {
    "zb_h1": ParallelConfig(schedule="zb_h1"),
    "interleaved": ParallelConfig(schedule="interleaved", virtual_stages=2),
    "three chunks": ParallelConfig(schedule="interleaved", virtual_stages=3, layout="E|t||t||L"),
    "zbv": ParallelConfig(schedule="zbv"),
    "uneven": ParallelConfig(layout="E|t*2 L"),
}


@dataclass
class Leg:
    """Whole tensors by kind and name, before the first and after the last step of a leg."""

    start: dict[str, Tensor]
    end: dict[str, Tensor]


PRECISIONS = {
    "fp32": PrecisionConfig(dtype="fp32"),
    "bf16": PrecisionConfig(dtype="bf16"),
    "lean": PrecisionConfig(dtype="bf16", master_weights="remainder", moments="bf16"),
}
KINDS = {
    "fp32": {"parameter", "exp_avg", "exp_avg_sq"},
    "bf16": {"parameter", "exp_avg", "exp_avg_sq", "master"},
    "lean": {"parameter", "exp_avg", "exp_avg_sq", "master_remainder"},
}


def _config(
    save: Path, dtype: Mode, tp: int, legs: int, leg: int, pipeline: tuple[int, str] = (1, "")
) -> RunConfig[TransformerConfig]:
    pp, name = pipeline
    return RunConfig(
        model=MODEL,
        save=str(save),
        device="cpu",
        parallel=dataclasses.replace(
            PIPELINES[name] if pp > 1 else ParallelConfig(),
            tp=tp,
            pp=pp,
            sequence_parallel=tp > 1,
        ),
        precision=PRECISIONS[dtype],
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, clip_grad=0.5),
        data=DataConfig(synthetic=True, seq_length=16, num_workers=0),
        train=TrainConfig(
            steps=legs * STEPS_A_LEG,
            global_batch_size=8,
            micro_batch_size=2,
            exit_at_step=(leg + 1) * STEPS_A_LEG,
        ),
    )


def _sizes(layout: Layout) -> tuple[int, int, int, str]:
    match layout:
        case (tp, dp):
            return tp, dp, 1, ""
        case (tp, dp, pp):
            return tp, dp, pp, "zb_h1"
        case (tp, dp, pp, name):
            return tp, dp, pp, name


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
        ("fp32", [(2, 2), (4, 1), (2, 2), (1, 4), (2, 2), (1, 1), (2, 2)]),
        ("fp32", [(1, 2, 2), (2, 1), (1, 1, 4), (1, 1), (2, 1, 2)]),
        (
            "fp32",
            [
                (1, 1, 2, "interleaved"),
                (1, 1, 2, "uneven"),
                (1, 1, 2, "three chunks"),
                (1, 2, 2, "zbv"),
                (1, 1, 2, "interleaved"),
            ],
        ),
        pytest.param("bf16", [(2, 2), (1, 4), (4, 1)], marks=pytest.mark.full),
        pytest.param("lean", [(2, 2), (1, 1), (4, 1), (1, 4)], marks=pytest.mark.full),
        ("lean", [(1, 1, 2), (1, 2), (1, 2, 2)]),
    ],
    ids=str,
)
def test_a_run_goes_on_at_another_layout(
    tmp_path: Path, pool: WorkerPool, dtype: Mode, layouts: list[Layout]
) -> None:
    before: Leg | None = None
    for number, layout in enumerate(layouts):
        tp, dp, pp, name = _sizes(layout)
        config = _config(tmp_path / "moved", dtype, tp, len(layouts), number, (pp, name))
        leg: Leg = pool.run(_leg, tp * dp * pp, config)[0]
        assert {name.split()[0] for name in leg.start} == KINDS[dtype]
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


def test_masters_survive_every_way_of_keeping_them(tmp_path: Path) -> None:
    """fp32 masters, remainders, the model itself in fp32, and back: no bit changes."""
    ways = ["bf16", "lean", "bf16", "fp32", "lean", "bf16"]
    before: Leg | None = None
    for number, way in enumerate(ways):
        config = _config(tmp_path, way, 1, len(ways), number)  # type: ignore[arg-type]
        if number:  # loaded and looked at, not trained: so what differs was not taken over
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, exit_at_step=STEPS_A_LEG + number)
            )
        trainer = Trainer(llama_task(config), config, ParallelContext.single())
        leg = Leg(_exact_masters(trainer), {})
        trainer.fit()
        leg.end = _exact_masters(trainer)
        if before is not None:
            assert leg.start.keys() == before.end.keys()
            assert not [n for n in leg.start if not leg.start[n].equal(before.end[n])]
        before = leg


def _exact_masters(trainer: Trainer) -> dict[str, Tensor]:
    """fp32 masters of all parameters, and their rounded values, however they are kept."""
    found: dict[str, Tensor] = {}
    for name, declared in trainer.state.parameters.items():
        values = declared.local.detach()
        states = {
            s.name: s.tensor for s in trainer.optimizer.state_tensors() if s.fragment.name == name
        }
        if "master" in states:
            master = states["master"]
        elif "master_remainder" in states:
            master = join_master(values, states["master_remainder"])
        else:
            master = values
        found[f"master {name}"] = master.clone()
        found[f"value {name}"] = round_master(values, torch.bfloat16).clone()
    return found
