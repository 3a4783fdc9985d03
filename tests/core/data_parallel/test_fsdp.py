"""Parameters sharded with torch's `fully_shard` train as those of one process, and as under
ZeRO-1."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from core.backends.chosen import chosen_backend
from core.config.data import DataConfig
from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.train import TrainConfig
from core.config.transformer import TransformerConfig
from core.data_parallel.modes import make_data_parallel, model_placement
from core.data_parallel.regions import DataParallel
from core.optim.gradients import ReplicaGradients
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import ZEROS, DropoutKey
from core.parallel.sharding import Declaration, declare_parameter, declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.distributed import WorkerPool
from core.testing.hf_models import save_hf_model
from core.testing.parity import assemble, assert_close, check_copies_agree, everyone
from core.testing.tiny_task import TinyConfig, TinyTask, tiny_run
from core.training.trainer import DTYPES, Trainer
from models.llama.model import build_llama
from models.llama.train import llama_task

STEPS, MICROBATCHES, BATCH, SEQUENCE = 3, 2, 8, 16
TOLERANCE = 1e-9

# No number of rows can be divided by 4 ranks: some have fewer than others, and the last has none of
# the query norm's. At tp 2 the key heads are held twice.
MODEL = TransformerConfig(
    num_layers=3,
    hidden_size=34,
    num_attention_heads=4,
    num_query_groups=1,
    head_dim=6,
    ffn_hidden_size=26,
    vocab_size=67,
    max_position_embeddings=64,
    qkv_bias=True,
    mlp_bias=True,
    attention_output_bias=True,
    qk_norm="rmsnorm",
    hidden_dropout=0.1,
    attention_dropout=0.1,
)


@dataclass(frozen=True)
class Case:
    """What is trained, and in which mode."""

    mode: str = "fsdp2"
    dtype: str = "fp64"
    tp: int = 1
    sp: bool = False
    tied: bool = False
    gpt: bool = False
    """Learned positions, and the branches of a layer side by side."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    moments: str = "fp32"
    fp8: str = "none"

    @property
    def model(self) -> TransformerConfig:
        model = dataclasses.replace(MODEL, tie_embeddings=self.tied, parallel_residual=self.gpt)
        if not self.gpt:
            return model
        return dataclasses.replace(model, position_embedding="learned", max_position_embeddings=18)

    @property
    def parallel(self) -> ParallelConfig:
        mode: Any = self.mode
        return ParallelConfig(tp=self.tp, sequence_parallel=self.sp, data_parallel=mode)

    @property
    def precision(self) -> PrecisionConfig:
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "moments": self.moments,
            "fp8": self.fp8,
        }
        return PrecisionConfig(**options)


@dataclass
class Outcome:
    """What must not depend on mode or layout; whole tensors."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


class Run:
    """A model, its optimizer and a loop."""

    def __init__(self, case: Case, ctx: ParallelContext | None = None) -> None:
        self.ctx = ctx or ParallelContext.create(case.parallel, torch.device("cpu"))
        dtype = DTYPES[case.precision.dtype]
        place = model_placement(self.ctx, case.parallel, dtype)
        backend = chosen_backend("local", case.precision, case.parallel, case.model.num_layers)
        self.model = build_llama(case.model, place, case.recompute, backend)
        self.sharing = publish_sharing(declared_parameters(self.model), self.ctx)
        self.parallel: DataParallel = make_data_parallel(
            [self.model], self.ctx, case.parallel, dtype
        )
        initialize_parameters(self.parallel.parameters, seed=3)
        config = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.2)
        self.optimizer = OptimizerStep(
            self.parallel, self.sharing, self.ctx, config, case.precision
        )
        self.optimizer.adamw.refresh_master_from_parameters()

    def backward(self, step: int) -> float:
        """Forward and backward of one step; the mean loss over all tokens that count."""
        generator = torch.Generator().manual_seed(step)
        text = torch.randint(0, MODEL.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
        mask = torch.rand((BATCH, SEQUENCE), generator=generator) < 0.6
        dp = self.ctx.dp
        size = BATCH // (dp.size * MICROBATCHES)
        total = torch.zeros((), dtype=torch.float64)
        self.parallel.begin_step(MICROBATCHES)
        for i in range(MICROBATCHES):
            first = (i * dp.size + dp.rank) * size
            at = slice(first, first + size)
            losses = self.model(text[at, :-1], text[at, 1:], DropoutKey(5, step, first))
            loss = torch.where(mask[at], losses, 0.0).sum() / mask.sum()
            (loss * self.optimizer.loss_scale.scale).backward()
            total += loss.detach()
        if dp.group is not None:
            dist.all_reduce(total, group=dp.group)
        return total.item()

    def gradients(self) -> dict[str, Tensor]:
        """Those of the first step, whole, and cleared afterwards."""
        self.backward(0)
        self.parallel.finish()
        regions = self.parallel.regions
        ReplicaGradients(regions, self.parallel.counted, self.sharing, self.ctx).reduce_partial()
        mine = [
            (f.name, f.global_shape, copy.global_, f.view(r.main_grad)[copy.local.slices].clone())
            for r in regions
            for f in r.fragments
            for copy in f.copies
        ]
        for region in regions:
            region.main_grad.zero_()
        self.parallel.zero()
        return self.whole(mine)

    def parameters(self) -> dict[str, Tensor]:
        """All parameters, whole; copies of them must agree."""
        self.parallel.wait_for_parameters()
        check_copies_agree(self.parallel.parameters, self.ctx)
        mine = [
            (name, d.sharding.global_shape, copy.global_, d.local[copy.local.slices])
            for name, d in self.parallel.parameters.items()
            for copy in d.sharding.copies
        ]
        return self.whole(mine)

    def whole(self, mine: list[Any]) -> dict[str, Tensor]:
        return assemble(everyone(mine, self.ctx))

    def outcome(self) -> Outcome:
        gradients = self.gradients()
        losses, norms = [], []
        for step in range(STEPS):
            losses.append(self.backward(step))
            norms.append(self.optimizer.step(1e-2, 0.1).grad_norm.item())
        return Outcome(losses, norms, gradients, self.parameters())


def _outcome(case: Case) -> Outcome:
    return Run(case).outcome()


@lru_cache(maxsize=8)
def _one_process(tied: bool, gpt: bool = False) -> Outcome:
    return Run(Case("zero1", tied=tied, gpt=gpt), ParallelContext.single()).outcome()


def _assert_equal(actual: Outcome, expected: Outcome, tolerance: float) -> None:
    for name in ("losses", "norms"):
        found, wanted = (torch.tensor(getattr(outcome, name)) for outcome in (actual, expected))
        assert_close(found, wanted, tolerance, name)
    for name in ("gradients", "parameters"):
        tensors, others = getattr(actual, name), getattr(expected, name)
        assert tensors.keys() == others.keys()
        for key in others:
            assert_close(tensors[key], others[key], tolerance, f"{name} {key}")


LAYOUTS = [
    (1, 2, False),
    (2, 2, True),
    pytest.param(1, 4, False, marks=pytest.mark.full),
    pytest.param(2, 2, False, marks=pytest.mark.full),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "dp", "sp"), LAYOUTS)
def test_layouts_equal_one_process_and_zero1(
    pool: WorkerPool, tp: int, dp: int, sp: bool, tied: bool
) -> None:
    case = Case(tp=tp, sp=sp, tied=tied)
    actual = pool.run(_outcome, tp * dp, case)[0]
    assert max(actual.norms) > 0.2  # gradients are clipped
    _assert_equal(actual, _one_process(tied), TOLERANCE)
    zero1 = pool.run(_outcome, tp * dp, dataclasses.replace(case, mode="zero1"))[0]
    _assert_equal(actual, zero1, TOLERANCE)


@pytest.mark.parametrize(("tp", "dp", "sp"), [(1, 4, False), (2, 2, True)])
def test_learned_positions_are_cut_like_all_parameters(
    pool: WorkerPool, tp: int, dp: int, sp: bool
) -> None:
    actual = pool.run(_outcome, tp * dp, Case(tp=tp, sp=sp, tied=True, gpt=True))[0]
    assert actual.gradients["embedding.position_embeddings.weight"].shape == (18, 34)
    _assert_equal(actual, _one_process(True, gpt=True), TOLERANCE)


RECOMPUTES = [
    RecomputeConfig(granularity="full"),
    RecomputeConfig(granularity="full", num_layers=2),
    RecomputeConfig(granularity="full", method="block", num_layers=2),
    RecomputeConfig(granularity="selective", modules=("core_attention", "mlp", "norm")),
]


@pytest.mark.parametrize("recompute", RECOMPUTES, ids=lambda r: f"{r.granularity} {r.num_layers}")
@pytest.mark.parametrize(
    ("tp", "dp", "sp"), [pytest.param(1, 2, False, marks=pytest.mark.full), (2, 2, True)]
)
def test_recompute_changes_nothing(
    pool: WorkerPool, tp: int, dp: int, sp: bool, recompute: RecomputeConfig
) -> None:
    case = Case(tp=tp, sp=sp, recompute=recompute)
    _assert_equal(pool.run(_outcome, tp * dp, case)[0], _one_process(False), TOLERANCE)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_computation_follows_zero1(pool: WorkerPool, dtype: str) -> None:
    case = Case(dtype=dtype)
    actual = pool.run(_outcome, 2, case)[0]
    zero1 = pool.run(_outcome, 2, dataclasses.replace(case, mode="zero1"))[0]
    assert {x.dtype for x in actual.parameters.values()} == {torch.float32}
    assert {x.dtype for x in zero1.parameters.values()} == {DTYPES[dtype]}
    assert actual.losses == pytest.approx(zero1.losses, rel=3e-3)
    assert actual.norms == pytest.approx(zero1.norms, rel=3e-2)
    for name, value in actual.gradients.items():
        if ".k_norm" not in name and ".linear_qkv.bias" not in name:  # hardly above rounding
            assert_close(value, zero1.gradients[name], 3e-2, name)


@pytest.mark.parametrize("fp8", ["current", pytest.param("rowwise", marks=pytest.mark.full)])
def test_fp8_is_that_of_zero1(pool: WorkerPool, fp8: str) -> None:
    """Weights are gathered, and quantised, twice a microbatch instead of once a step."""
    case = Case(tp=2, sp=True, fp8=fp8)
    actual = pool.run(_outcome, 4, case)[0]
    zero1 = pool.run(_outcome, 4, dataclasses.replace(case, mode="zero1"))[0]
    _assert_equal(actual, zero1, TOLERANCE)


def test_bf16_moments_work(pool: WorkerPool) -> None:
    case = Case(dtype="bf16", moments="bf16")
    lean, full = (
        pool.run(_outcome, 2, dataclasses.replace(case, moments=moments))[0]
        for moments in ("bf16", "fp32")
    )
    assert lean.losses == pytest.approx(full.losses, rel=1e-2)
    assert lean.losses != full.losses


# ---- What a rank holds ---------------------------------------------------------------------------


@dataclass
class Holding:
    """Of one rank."""

    units: set[str]
    numel: int
    rows: dict[str, tuple[int, ...]]
    in_place: bool
    accumulated: bool
    resharded: bool


def _holding(case: Case) -> Holding:
    run = Run(case)
    assert len(list(run.model.parameters())) == len(run.parallel.parameters)  # tied: one tensor
    storages = [d.local.untyped_storage().data_ptr() for d in run.parallel.parameters.values()]
    grads = [region.main_grad.data_ptr() for region in run.parallel.regions]
    run.backward(0)
    found = [
        d.parameter.grad.to_local().data_ptr()  # type: ignore[union-attr]
        for d in run.parallel.parameters.values()
        if d.local.numel()
    ]
    run.optimizer.step(1e-2, 0.1)
    with torch.no_grad():
        run.model(*torch.zeros((2, 1, 4), dtype=torch.int64))
    run.parallel.wait_for_parameters()
    now = []
    for declared in run.parallel.parameters.values():
        parameter = declared.parameter
        assert isinstance(parameter, DTensor)
        local = parameter.to_local()
        assert local.equal(declared.local)
        now.append(local.untyped_storage().data_ptr())
    return Holding(
        {name for name, module in run.model.named_modules() if isinstance(module, FSDPModule)},
        sum(region.values.numel() for region in run.parallel.regions),
        {name: tuple(d.local.shape) for name, d in run.parallel.parameters.items()},
        now == storages,
        found == grads,
        all(isinstance(parameter, DTensor) for parameter in run.model.parameters()),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_keeps_its_rows_in_one_place(pool: WorkerPool, tied: bool) -> None:
    held = pool.run(_holding, 4, Case(dtype="bf16", tied=tied))
    layers = {f"decoder.layers.{i}" for i in range(MODEL.num_layers)}
    assert held[0].units == {"", *layers} | (set() if tied else {"embedding", "output_layer"})
    assert all(one.in_place and one.accumulated and one.resharded for one in held)
    rows = [one.rows["decoder.layers.0.self_attention.q_norm.weight"] for one in held]
    assert rows == [(2,), (2,), (2,), (0,)]
    rows = [one.rows["decoder.layers.0.self_attention.linear_proj.weight"] for one in held]
    assert rows == [(9, 24), (9, 24), (9, 24), (7, 24)]
    place = Placement(ParallelContext.single(), torch.float32, torch.device("meta"))
    whole = build_llama(dataclasses.replace(MODEL, tie_embeddings=tied), place)
    assert sum(one.numel for one in held) == sum(p.numel() for p in whole.parameters())
    assert max(one.numel for one in held) < 1.1 * sum(one.numel for one in held) / 4


def _with_buffers() -> None:
    config = ParallelConfig(data_parallel="fsdp2")
    ctx = ParallelContext.create(config, torch.device("cpu"))
    model = nn.Module()
    declaration = Declaration((4,), whole_copy((4,)), ZEROS)
    device = torch.device("meta")
    declare_parameter(model, "weight", (4,), declaration, dtype=torch.float32, device=device)
    model.register_buffer("table", torch.ones(4, device=device))
    with pytest.raises(ValueError, match="must have no buffers"):
        make_data_parallel([model], ctx, config)


def _too_narrow() -> None:
    config = ParallelConfig(data_parallel="fsdp2")
    ctx = ParallelContext.create(config, torch.device("cpu"))
    model = build_llama(MODEL, Placement(ctx, torch.bfloat16, ctx.device))
    with pytest.raises(ValueError, match=r"is torch\.bfloat16: build the model in fp32"):
        make_data_parallel([model], ctx, config)


def _with_values() -> bool:
    """A model that has been filled already is sharded as it is."""
    config = ParallelConfig(data_parallel="fsdp2")
    ctx = ParallelContext.create(config, torch.device("cpu"))
    model = build_llama(MODEL, Placement(ctx, torch.float32, ctx.device))
    initialize_parameters(declared_parameters(model), seed=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = make_data_parallel([model], ctx, config)
    for name, declared in made.parameters.items():
        assert declared.sharding.name == name
        for copy in declared.sharding.copies:
            assert declared.local[copy.local.slices].equal(before[name][copy.global_.slices])
    return True


def test_a_filled_model_keeps_its_numbers(pool: WorkerPool) -> None:
    assert pool.run(_with_values, 4) == [True] * 4


def test_a_model_with_buffers_is_refused(pool: WorkerPool) -> None:
    pool.run(_with_buffers, 2)


def test_parameters_too_narrow_for_masters_are_refused(pool: WorkerPool) -> None:
    pool.run(_too_narrow, 2)


# ---- Runs ----------------------------------------------------------------------------------------


def _config(save: Path, case: Case, legs: int, leg: int) -> RunConfig[TransformerConfig]:
    return RunConfig(
        model=case.model,
        save=str(save),
        device="cpu",
        parallel=case.parallel,
        precision=case.precision,
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, clip_grad=0.5),
        data=DataConfig(synthetic=True, seq_length=SEQUENCE, num_workers=0),
        train=TrainConfig(
            steps=legs * STEPS,
            global_batch_size=8,
            micro_batch_size=1,
            exit_at_step=(leg + 1) * STEPS,
            eval_interval=2,  # a step follows
            eval_steps=1,
        ),
    )


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Master weights and moments, whole, before and after a leg."""
    ctx, state = trainer.ctx, trainer.state
    state.data_parallel.wait_for_parameters()
    check_copies_agree(state.parameters, ctx)
    mine = [
        (
            f"{s.name} {s.fragment.name}",
            s.fragment.global_shape,
            c.global_,
            s.tensor[c.local.slices],
        )
        for s in trainer.optimizer.state_tensors()
        for c in s.fragment.copies
    ]
    if not any(name.startswith("master ") for name, *_ in mine):
        mine += [
            (f"master {name}", d.sharding.global_shape, c.global_, d.local[c.local.slices])
            for name, d in state.parameters.items()
            for c in d.sharding.copies
        ]
    return assemble(everyone(mine, ctx))


def _leg(config: RunConfig[TransformerConfig]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(llama_task(config), config, ctx)
    start = {name: value.clone() for name, value in _state(trainer).items()}
    trainer.fit()
    return start, _state(trainer)


def _losses(save: Path) -> list[float]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "grad_norm" in row]


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_goes_on_in_another_mode(tmp_path: Path, pool: WorkerPool, dtype: str) -> None:
    """Every bit of master weights and moments is taken over, there and back."""
    legs = [
        (2, Case("fsdp2", dtype)),
        (4, Case("zero1", dtype, tp=2, sp=True)),
        (4, Case("fsdp2", dtype, tp=2)),
        (2, Case("zero1", dtype)),
    ]
    before = None
    for number, (size, case) in enumerate(legs):
        config = _config(tmp_path / "moved", case, len(legs), number)
        start, end = pool.run(_leg, size, config)[0]
        assert {name.split()[0] for name in start} == {"master", "exp_avg", "exp_avg_sq"}
        if before is not None:
            assert start.keys() == before.keys()
            assert not [name for name in start if not start[name].equal(before[name])]
        before = end
    whole = _config(tmp_path / "whole", legs[-1][1], len(legs), len(legs) - 1)
    Trainer(llama_task(whole), whole, ParallelContext.single()).fit()
    losses, expected = _losses(tmp_path / "moved"), _losses(tmp_path / "whole")
    assert len(losses) == len(legs) * STEPS
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == "fp32" else 2e-2)


def _imported(config: RunConfig[TransformerConfig]) -> dict[str, Tensor]:
    ctx = ParallelContext.create(config.parallel, torch.device("cpu"))
    trainer = Trainer(llama_task(config), config, ctx)
    return {n: x for n, x in _state(trainer).items() if n.startswith("master ")}


def test_hugging_face_weights_fill_the_rows(tmp_path: Path, pool: WorkerPool) -> None:
    from converters.source import open_source

    folder = save_hf_model(tmp_path / "hf", "llama")
    model = open_source(folder).config
    masters = []
    for mode in ("fsdp2", "zero1"):
        config = _config(tmp_path / mode, Case(mode, "fp32", tp=2), 1, 0)
        config = dataclasses.replace(config, model=model, init_from=str(folder))
        masters.append(pool.run(_imported, 4, config)[0])
    assert masters[0].keys() == masters[1].keys()
    assert all(masters[0][name].equal(value) for name, value in masters[1].items())


def _tiny_losses(mode: Any, vocab_size: int) -> list[float]:
    config = tiny_run(steps=4, micro_batch_size=1, eval_interval=4)
    parallel = ParallelConfig(data_parallel=mode)
    tiny = TinyConfig(vocab_size=vocab_size)
    config = dataclasses.replace(config, model=tiny, parallel=parallel)
    ctx = ParallelContext.create(parallel, torch.device("cpu"))
    trainer = Trainer(TinyTask(tiny), config, ctx)
    trainer.fit()
    losses = trainer.evaluate()
    assert losses is not None
    return [*losses.values(), trainer.state.position.skipped_steps]


@pytest.mark.parametrize("vocab_size", [11, 5, 1])
def test_ranks_without_rows_take_part(pool: WorkerPool, vocab_size: int) -> None:
    """A table of 5 rows over 4 ranks: 2, 2, 1 and 0."""
    sharded = pool.run(_tiny_losses, 4, "fsdp2", vocab_size)
    zero1 = pool.run(_tiny_losses, 4, "zero1", vocab_size)
    assert sharded[0] == sharded[3] == pytest.approx(zero1[0], rel=TOLERANCE, abs=1e-12)
    assert math.isfinite(sharded[0][0])


def test_one_data_parallel_rank_has_nothing_to_share_out(pool: WorkerPool) -> None:
    alone = pool.run(_outcome, 2, Case(tp=2))[0]
    _assert_equal(alone, _one_process(False), TOLERANCE)
