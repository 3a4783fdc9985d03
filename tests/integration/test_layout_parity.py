"""Every layout computes what one process computes: loss, every gradient, and parameters after
three optimizer steps."""

import dataclasses
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import RopeConfig, TransformerConfig
from core.data.loader import Batch
from core.optim.gradients import ReplicaGradients
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import initialize_parameters
from core.parallel.random import Init
from core.parallel.sharding import DeclaredParameter
from core.pipeline.schedules import stage_map_for
from core.testing.distributed import WorkerPool
from core.testing.parity import assert_close, check_copies_agree, gather_regions, gather_whole
from core.training.exchange import Exchange
from core.training.staged_model import StagedModel
from models.gpt.train import gpt_task
from models.llama.train import llama_task

DataParallelMode = Literal["zero1", "replicated"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"]
GLOBAL_BATCH, SEQUENCE = 8, 16
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
BIASED: dict[str, Any] = {
    "normalization": "layernorm",
    "gated_mlp": False,
    "activation": "gelu",
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
HALF_ROTATED = RopeConfig(partial_factor=0.5)
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
    # Enough for 8 pieces; tied and untied.
    "deep": dataclasses.replace(
        BASE, num_layers=6, qkv_bias=True, num_query_groups=1, tie_embeddings=True
    ),
    "deep untied": dataclasses.replace(BASE, num_layers=7, normalization="layernorm"),
    "layernorm": dataclasses.replace(
        BASE, normalization="layernorm", gated_mlp=False, activation="gelu_tanh", mlp_bias=True
    ),
    # A GPT-2: learned positions of which the sequence takes the first, all biases, a tied head.
    "gpt": dataclasses.replace(
        BASE, num_query_groups=None, position_embedding="learned", tie_embeddings=True, **BIASED
    ),
    # A GPT-NeoX: branches side by side, rotary embedding on half of each head.
    "neox": dataclasses.replace(
        BASE, num_query_groups=None, rope=HALF_ROTATED, parallel_residual=True, **BIASED
    ),
    # Both at once, and enough for 8 pieces.
    "deep gpt": dataclasses.replace(
        BASE,
        num_layers=6,
        position_embedding="learned",
        parallel_residual=True,
        tie_embeddings=True,
        **BIASED,
    ),
}
GPT = ("gpt", "neox", "deep gpt")


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    dropout: float = 0.0
    dtype: str = "fp64"
    steps: int = 3
    label_smoothing: float = 0.0
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    fp8: Literal["none", "current", "rowwise"] = "none"

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
    pp: int = 1
    schedule: Schedule = "1f1b"
    chunks: int | None = None
    layout: str | None = None
    microbatches: int = 2

    @property
    def size(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(
            tp=self.tp,
            pp=self.pp,
            schedule=self.schedule,
            virtual_stages=self.chunks,
            layout=self.layout,
            sequence_parallel=self.sp,
            data_parallel=self.mode,
            bucket_mib=1,
        )


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
    def __init__(self, case: Case, layout: Layout, ctx: ParallelContext) -> None:
        self.case, self.ctx = case, ctx
        assert (ctx.tp.size, ctx.dp.size, ctx.pp.size) == (layout.tp, layout.dp, layout.pp)
        self.microbatches = layout.microbatches
        self.size = GLOBAL_BATCH // (layout.dp * layout.microbatches)
        config = RunConfig(
            model=case.config,
            parallel=dataclasses.replace(layout.config, recompute=case.recompute),
            # What users cannot ask for: FP8 between fp64 layers shows whether scales are the same.
            precision=PrecisionConfig(dtype="fp64", fp8=case.fp8, fp8_bf16_last_layers=1)
            if case.fp8 != "none"
            else PrecisionConfig(),
            data=DataConfig(synthetic=True, seq_length=SEQUENCE),
            train=TrainConfig(
                micro_batch_size=self.size, label_smoothing=case.label_smoothing, steps=1
            ),
        )
        dtype = torch.float64 if case.dtype == "fp64" else torch.float32
        task = (gpt_task if case.model in GPT else llama_task)(config)
        self.model = StagedModel(task, config, ctx, dtype)
        self.data_parallel, sharing = self.model.data_parallel, self.model.sharing
        self.parameters = self.data_parallel.parameters
        initialize_parameters(_randomized(self.parameters), seed=3)
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
        batches = []
        for i in range(self.microbatches):
            sample = (i * dp.size + dp.rank) * self.size
            at = slice(sample, sample + self.size)
            batches.append(Batch(tokens[at], labels[at], mask[at], sample))
        sums = self.model.train(batches, {"lm": 1.0 / mask.sum()}, 5, step)
        exchange = Exchange(self.ctx, self.model.loss_stage)
        return (exchange.sum(False, (), [sums["loss/lm"]])[1] / mask.sum()).item()

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


def _context(layout: Layout) -> ParallelContext:
    return ParallelContext.create(layout.config, torch.device("cpu"))


def _worker(cases: list[Case], layout: Layout) -> list[Outcome] | None:
    ctx = _context(layout)  # one for all: groups stay until the call ends, each with its threads
    outcomes = [_Run(case, layout, ctx).outcome() for case in cases]
    return outcomes if torch.distributed.get_rank() == 0 else None


@lru_cache(maxsize=64)
def _reference(case: Case) -> Outcome:
    alone = dataclasses.replace(case, recompute=RecomputeConfig())
    return _Run(alone, Layout(), _context(Layout())).outcome()


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
    pytest.param(Layout(tp, dp, sp), marks=[pytest.mark.full] if tp * dp == 8 and not sp else [])
    for tp in (1, 2, 4)
    for dp in (1, 2, 4)
    for sp in ((False, True) if tp > 1 else (False,))
    if 1 < tp * dp <= 8
] + [Layout(1, 4, mode="replicated"), Layout(2, 2, True, mode="replicated")]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_equals_one_process(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("rich", 0.2, label_smoothing=0.1)])


@pytest.mark.parametrize("layout", [Layout(1, 4), Layout(2), Layout(2, 2, True)], ids=str)
def test_plain_model_equals_one_process(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("plain")])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, 1, True),
        pytest.param(Layout(4, 2, True), marks=pytest.mark.full),
        pytest.param(Layout(2, 2), marks=pytest.mark.full),
        pytest.param(Layout(1, 2, mode="replicated"), marks=pytest.mark.full),
        Layout(2, 2, True, pp=2, microbatches=2),
        Layout(1, 1, pp=2, schedule="zb_h1", microbatches=8),
    ],
    ids=str,
)
def test_gpt_equals_one_process(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("gpt", 0.2), Case("neox", 0.2), Case("gpt", steps=1)])


RECOMPUTES = [
    RecomputeConfig(granularity="full", num_layers=2),
    RecomputeConfig(granularity="full", method="block"),
    RecomputeConfig(granularity="selective", modules=("core_attention", "mlp", "norm")),
]


FP8_CASES: list[tuple[Literal["current", "rowwise"], RecomputeConfig]] = [
    ("current", RECOMPUTES[0]),
    ("rowwise", RECOMPUTES[2]),
]


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_model_and_recompute(pool: WorkerPool, layout: Layout) -> None:
    cases = [Case(model, dropout) for model in MODELS for dropout in (0.0, 0.2)]
    cases += [
        Case(model, 0.2, recompute=recompute)
        for model in ("rich", "neox")
        for recompute in RECOMPUTES
    ]
    _compare(pool, layout, cases)


@pytest.mark.parametrize(
    "layout",
    [Layout(2, 2, True), pytest.param(Layout(4, 2, True), marks=pytest.mark.full)],
    ids=str,
)
def test_recompute_under_a_layout(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("rich", 0.2, recompute=recompute) for recompute in RECOMPUTES])


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4),
        Layout(4, 1, True),
        Layout(2, 1, True, pp=2, schedule="zbv"),
    ],
    ids=str,
)
def test_fp8_rounds_alike_at_every_layout(pool: WorkerPool, layout: Layout) -> None:
    """To the same 1e-9, for a scale that differed would change what is rounded by percents.
    Microbatches are the same: each has its scales."""
    cases = [Case("plain", 0.2, steps=2, fp8=fp8, recompute=r) for fp8, r in FP8_CASES]
    _compare(pool, layout, cases)


def _pipelines(tp: int, dp: int, pp: int) -> list[Layout]:
    """Every schedule; as many microbatches as there are samples, which leaves warm-up and tail."""
    chunks: dict[Schedule, int | None] = {"1f1b": None, "gpipe": None, "zb_h1": None, "zbv": None}
    chunks["interleaved"] = 2
    return [
        Layout(tp, dp, tp > 1, pp=pp, schedule=s, chunks=c, microbatches=GLOBAL_BATCH // dp)
        for s, c in chunks.items()
    ]


@pytest.mark.parametrize(
    "layout",
    [
        *_pipelines(1, 1, 2),
        Layout(1, 2, pp=2, schedule="zbv", microbatches=4),
        Layout(1, 2, mode="replicated", pp=2),
        Layout(2, 2, True, pp=2, layout="E t|t*5 L", microbatches=2),
        Layout(2, 1, True, pp=4, schedule="zb_h1", layout="E|t*3||t*3 L", microbatches=4),
        Layout(1, 2, pp=4, schedule="interleaved", microbatches=2),
    ],
    ids=str,
)
def test_pipeline_equals_one_process(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("deep", 0.2, steps=2)])


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        layout
        for pp in (2, 4)
        for tp in (1, 2)
        for dp in (1, 2)
        if pp * tp * dp <= 8
        for layout in _pipelines(tp, dp, pp)
    ],
    ids=str,
)
def test_every_pipeline(pool: WorkerPool, layout: Layout) -> None:
    cases = [Case("deep", 0.2), Case("deep untied", 0.1, label_smoothing=0.1)]
    cases += [Case("deep gpt", 0.2), Case("deep gpt", steps=2)]
    cases += [Case("deep", 0.2, steps=2, recompute=recompute) for recompute in RECOMPUTES]
    _compare(pool, layout, cases)


UNEVEN = {2: "E t|t*5 L", 4: "E|t*3||t*3 L", 8: "E|t||t*2||t|t*2|L"}
"""Layouts of the deep model by number of pieces, with pieces that only pass data on."""


@pytest.mark.full
@pytest.mark.parametrize(
    "layout",
    [
        dataclasses.replace(
            layout, layout=UNEVEN[stage_map_for(layout.schedule, pp, layout.chunks).pieces]
        )
        for tp, dp, pp in ((1, 1, 2), (2, 1, 2), (1, 1, 4), (1, 2, 4))
        for layout in _pipelines(tp, dp, pp)
    ],
    ids=str,
)
def test_every_uneven_pipeline(pool: WorkerPool, layout: Layout) -> None:
    _compare(pool, layout, [Case("deep", 0.2), Case("deep", 0.2, recompute=RECOMPUTES[0])])


@pytest.mark.parametrize(("schedule", "model"), [("zb_h1", "deep"), ("zbv", "deep untied")])
def test_zero_bubble_gives_the_bits_of_1f1b(
    pool: WorkerPool, schedule: Schedule, model: str
) -> None:
    """In fp32: the same products, summed in the same order."""
    case = Case(model, dropout=0.1, dtype="fp32")
    names: tuple[Schedule, Schedule] = ("1f1b", schedule)
    usual, other = (
        pool.run(_worker, 2, [case], Layout(pp=2, schedule=name, microbatches=8))[0][0]
        for name in names
    )
    assert usual.losses == other.losses
    assert usual.gradients.keys() == other.gradients.keys()
    for parameter, gradient in usual.gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other.gradients[parameter]), parameter
        assert torch.equal(usual.parameters[parameter], other.parameters[parameter]), parameter


def _loss_curve(case: Case, layout: Layout) -> list[float]:
    run = _Run(case, layout, _context(layout))
    losses = []
    for step in range(case.steps):
        losses.append(run.backward(step % 2))
        run.optimizer.step(1e-2, 0.1)
    return losses


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2),
        pytest.param(Layout(4, 2, True), marks=pytest.mark.full),
        Layout(1, 4),
        Layout(1, 2, pp=2, schedule="zb_h1", microbatches=4),
    ],
    ids=str,
)
def test_fp32_loss_curve_is_that_of_one_process(pool: WorkerPool, layout: Layout) -> None:
    case = Case("plain", dropout=0.1, dtype="fp32", steps=20)
    expected = torch.tensor(_loss_curve(case, Layout()))
    actual = torch.tensor(pool.run(_loss_curve, layout.size, case, layout)[0])
    assert expected[-1] < expected[0]
    assert_close(actual, expected, 1e-4, f"{layout}")
