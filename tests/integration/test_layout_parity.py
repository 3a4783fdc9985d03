"""Every layout computes what one process computes: loss, every gradient, and parameters after
three optimizer steps."""

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import pytest
import torch
from torch import Tensor

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import RopeConfig, TransformerConfig
from core.data_parallel.modes import make_data_parallel
from core.optim.gradients import ReplicaGradients, check_copies_agree, publish_sharing
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import DropoutKey, Init
from core.parallel.sharding import DeclaredParameter, declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.parity import assert_close, gather_regions, gather_whole
from models.llama.model import build_llama

DataParallelMode = Literal["zero1", "replicated"]
GLOBAL_BATCH, MICROBATCHES, SEQUENCE = 8, 2, 16
TOLERANCE = 1e-9

BASE = TransformerConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    ffn_hidden_size=40,
    vocab_size=67,
    max_position_embeddings=64,
)
MODELS = {
    # Everything a layer can have: biases, query norms, window, tied head, key heads fewer than tp
    # 4.
    "rich": dataclasses.replace(
        BASE,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        qk_norm="rmsnorm",
        sliding_window=5,
        sliding_window_layers=(1,),
        tie_embeddings=True,
    ),
    "plain": dataclasses.replace(
        BASE,
        num_query_groups=None,
        rope=RopeConfig(type="llama3", factor=8.0, original_max_position_embeddings=8, theta=5e5),
    ),
    "layernorm": dataclasses.replace(
        BASE, normalization="layernorm", gated_mlp=False, activation="gelu_tanh", mlp_bias=True
    ),
}


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    dropout: float = 0.0
    dtype: str = "fp64"
    steps: int = 3
    label_smoothing: float = 0.0
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)

    @property
    def config(self) -> TransformerConfig:
        return dataclasses.replace(
            MODELS[self.model], hidden_dropout=self.dropout, attention_dropout=self.dropout
        )


@dataclass(frozen=True)
class Layout:
    """One way to spread it."""

    tp: int = 1
    dp: int = 1
    sp: bool = False
    mode: DataParallelMode = "zero1"

    @property
    def size(self) -> int:
        return self.tp * self.dp


@dataclass
class Outcome:
    """What must not depend on the layout."""

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    norms: list[float]


def _batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and an uneven loss mask of a global batch: one sample has nothing to learn
    from."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, BASE.vocab_size, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    mask = torch.rand((GLOBAL_BATCH, SEQUENCE), generator=generator) < 0.6
    mask[3] = False
    mask[4] = True
    return tokens[:, :-1], tokens[:, 1:], mask


def _randomized(parameters: dict[str, DeclaredParameter]) -> dict[str, DeclaredParameter]:
    """Norms and biases start from random numbers too: constants hide mistakes."""
    return {
        name: dataclasses.replace(d, init=Init("normal", 0.2, mean=d.init.value))
        if d.init.kind == "constant"
        else dataclasses.replace(d, init=Init("normal", 0.2))
        for name, d in parameters.items()
    }


class _Run:
    def __init__(self, case: Case, layout: Layout) -> None:
        config = ParallelConfig(
            tp=layout.tp, sequence_parallel=layout.sp, data_parallel=layout.mode, bucket_mib=1
        )
        self.case = case
        self.ctx = ctx = ParallelContext.create(config, torch.device("cpu"))
        assert (ctx.tp.size, ctx.dp.size) == (layout.tp, layout.dp)
        dtype = torch.float64 if case.dtype == "fp64" else torch.float32
        self.model = build_llama(case.config, Placement(ctx, dtype, ctx.device), case.recompute)
        self.parameters = declared_parameters(self.model)
        initialize_parameters(_randomized(self.parameters), seed=3)
        sharing = publish_sharing(self.parameters, ctx)
        self.data_parallel = make_data_parallel([self.model], ctx, config)
        regions, counted = self.data_parallel.regions, self.data_parallel.counted
        self.gradients = ReplicaGradients(regions, counted, sharing, ctx)
        self.optimizer = OptimizerStep(
            self.data_parallel,
            sharing,
            ctx,
            OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5),
            PrecisionConfig(dtype="fp64" if case.dtype == "fp64" else "fp32"),
        )

    def backward(self, step: int) -> float:
        """Forward and backward of one step; the global mean loss."""
        tokens, labels, mask = _batch(step)
        dp = self.ctx.dp
        size = GLOBAL_BATCH // (dp.size * MICROBATCHES)
        total = torch.zeros((), dtype=torch.float64)
        self.data_parallel.begin_step(MICROBATCHES)
        for i in range(MICROBATCHES):
            sample = (i * dp.size + dp.rank) * size
            at = slice(sample, sample + size)
            key = DropoutKey(5, step, sample)
            losses = self.model(tokens[at], labels[at], key, self.case.label_smoothing)
            loss = torch.where(mask[at], losses, 0.0).sum() / mask.sum()
            loss.backward()
            total += loss.detach()
        if self.ctx.dp.group is not None:
            torch.distributed.all_reduce(total, group=self.ctx.dp.group)
        return total.item()

    def outcome(self) -> Outcome:
        first = self.backward(0)
        self.data_parallel.finish()
        self.gradients.reduce_partial()
        gradients = gather_regions(self.data_parallel, self.ctx)
        for region in self.data_parallel.regions:
            region.main_grad.zero_()
        self.data_parallel.zero()
        losses, norms = [first], []
        for step in range(self.case.steps):
            losses.append(self.backward(step))
            norms.append(self.optimizer.step(1e-2, 0.1).grad_norm.item())
        self.data_parallel.wait_for_parameters()
        check_copies_agree(self.parameters, self.ctx)
        values = {n: d.parameter.data for n, d in self.parameters.items()}
        return Outcome(losses, gradients, gather_whole(self.parameters, self.ctx, values), norms)


def _worker(cases: list[Case], layout: Layout) -> list[Outcome] | None:
    outcomes = [_Run(case, layout).outcome() for case in cases]
    return outcomes if torch.distributed.get_rank() == 0 else None


@lru_cache(maxsize=64)
def _reference(case: Case) -> Outcome:
    return _Run(dataclasses.replace(case, recompute=RecomputeConfig()), Layout()).outcome()


def _compare(pool: WorkerPool, layout: Layout, cases: list[Case]) -> None:
    results = pool.run(_worker, layout.size, cases, layout)[0]
    for case, actual in zip(cases, results, strict=True):
        expected = _reference(case)
        where = f"{case.model}, dropout {case.dropout}, {layout}"
        assert len(actual.losses) == case.steps + 1
        assert_close(torch.tensor(actual.losses), torch.tensor(expected.losses), TOLERANCE, where)
        assert_close(torch.tensor(actual.norms), torch.tensor(expected.norms), TOLERANCE, where)
        assert actual.gradients.keys() == expected.gradients.keys()
        for name in expected.gradients:
            assert_close(
                actual.gradients[name],
                expected.gradients[name],
                TOLERANCE,
                f"gradient of {name}, {where}",
            )
            assert_close(
                actual.parameters[name],
                expected.parameters[name],
                TOLERANCE,
                f"{name} after {case.steps} steps, {where}",
            )


LAYOUTS = [
    Layout(tp, dp, sp)
    for tp in (1, 2, 4)
    for dp in (1, 2, 4)
    for sp in ((False, True) if tp > 1 else (False,))
    if 1 < tp * dp <= 8
] + [Layout(1, 4, mode="replicated"), Layout(2, 2, True, mode="replicated")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_one_process(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("rich", 0.2, label_smoothing=0.1), Case("plain")])


RECOMPUTES = [
    RecomputeConfig(granularity="full", num_layers=2),
    RecomputeConfig(granularity="full", method="block"),
    RecomputeConfig(granularity="selective", modules=("core_attention", "mlp", "norm")),
]


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_model_and_recompute(pool: WorkerPool, layout: Layout) -> None:
    cases = [Case(model, dropout) for model in MODELS for dropout in (0.0, 0.2)]
    cases += [Case("rich", 0.2, recompute=recompute) for recompute in RECOMPUTES]
    _compare(pool, layout, cases)


@pytest.mark.parametrize("layout", [Layout(2, 2, True), Layout(4, 2, True)], ids=str)
def test_recompute_under_a_layout(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("rich", 0.2, recompute=recompute) for recompute in RECOMPUTES])


def _loss_curve(case: Case, layout: Layout) -> list[float]:
    run = _Run(case, layout)
    losses = []
    for step in range(case.steps):
        losses.append(run.backward(step % 2))
        run.optimizer.step(1e-2, 0.1)
    return losses


@pytest.mark.parametrize("layout", [Layout(2), Layout(4, 2, True), Layout(1, 4)], ids=str)
def test_fp32_loss_curve_is_that_of_one_process(pool: WorkerPool, layout: Layout) -> None:
    case = Case("plain", dropout=0.1, dtype="fp32", steps=20)
    expected = torch.tensor(_loss_curve(case, Layout()))
    actual = torch.tensor(pool.run(_loss_curve, layout.size, case, layout)[0])
    assert expected[-1] < expected[0]
    assert_close(actual, expected, 1e-4, f"{layout}")
