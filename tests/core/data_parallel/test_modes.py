"""ZeRO-1 against replicated data parallelism, with a real model."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.modes import make_data_parallel
from core.optim.rounding import join_master
from core.optim.step import OptimizerStep
from core.parallel.collectives import own_part
from core.parallel.context import Axis, ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from core.testing.distributed import WorkerPool
from core.testing.parity import assert_close, check_copies_agree, gather_fragments, gather_whole
from models.llama.model import build_llama

CPU = torch.device("cpu")
FP32, BF16 = PrecisionConfig(dtype="fp32"), PrecisionConfig(dtype="bf16")
SAMPLES, SEQUENCE, MICROBATCHES = 8, 8, 2

# Rows of 36, 48 and 100 elements, so that cuts at multiples of 128 fall inside them.
SMALL = TransformerConfig(
    num_layers=2,
    hidden_size=36,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    ffn_hidden_size=100,
    vocab_size=67,
    max_position_embeddings=32,
    hidden_dropout=0.1,
)
MODELS = {
    "small": SMALL,
    "tied, one key head": replace(SMALL, num_query_groups=1, tie_embeddings=True, qkv_bias=True),
    # Several buckets of 1 MiB.
    "wide": replace(SMALL, num_layers=3, hidden_size=132, ffn_hidden_size=500, head_dim=22),
}


@dataclass(frozen=True)
class Case:
    """One run of some steps."""

    model: str = "small"
    mode: Literal["zero1", "replicated"] = "zero1"
    clip: float = 0.0
    precision: PrecisionConfig = FP32
    steps: int = 5
    overlap: bool = True
    frozen: str = ""
    """Part of the names of parameters that are not trained."""
    spoiled: tuple[int, ...] = ()
    """Steps whose gradient is not a number, so that they are skipped."""
    recompute: RecomputeConfig = RecomputeConfig()  # noqa: RUF009 (frozen)


class _Run:
    def __init__(self, case: Case, tp: int) -> None:
        self.case = case
        config = ParallelConfig(
            tp=tp,
            sequence_parallel=tp > 1,
            data_parallel=case.mode,
            bucket_mib=1,
            overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap,
        )
        self.ctx = ctx = ParallelContext.create(config, CPU)
        dtype = torch.bfloat16 if case.precision.dtype == "bf16" else torch.float32
        place = Placement(ctx, dtype, CPU)
        self.model = build_llama(MODELS[case.model], place, case.recompute)
        self.parameters = declared_parameters(self.model)
        initialize_parameters(self.parameters, seed=0)
        for name, declared in self.parameters.items():
            declared.parameter.requires_grad_(not case.frozen or case.frozen not in name)
        sharing = publish_sharing(self.parameters, ctx)
        self.data_parallel = make_data_parallel([self.model], ctx, config)
        self.optimizer = OptimizerStep(
            self.data_parallel,
            sharing,
            ctx,
            OptimizerConfig(lr=3e-3, clip_grad=case.clip),
            case.precision,
        )

    def step(self, number: int) -> float:
        """One step; the gradient's norm."""
        dp = self.ctx.dp
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 67, (SAMPLES, SEQUENCE + 1), generator=generator)
        size = SAMPLES // dp.size // MICROBATCHES
        factor = float("nan") if number in self.case.spoiled else 1.0
        self.data_parallel.begin_step(MICROBATCHES)
        for i in range(MICROBATCHES):
            first = (i * dp.size + dp.rank) * size
            part = tokens[first : first + size]
            losses = self.model(part[:, :-1], part[:, 1:], DropoutKey(0, number, first))
            (losses.sum() * (factor / (SAMPLES * SEQUENCE))).backward()
        result = self.optimizer.step(3e-3, 0.1)
        assert bool(result.applied) is (number not in self.case.spoiled)
        return float(result.grad_norm)

    def whole(self) -> dict[str, Tensor]:
        """Parameters and optimizer state."""
        self.data_parallel.wait_for_parameters()
        check_copies_agree(self.parameters, self.ctx)
        values = {n: d.parameter.data for n, d in self.parameters.items()}
        found = {
            f"parameter {n}": x for n, x in gather_whole(self.parameters, self.ctx, values).items()
        }
        states = list(self.optimizer.state_tensors())
        for kind in sorted({state.name for state in states}):
            pieces = ((s.fragment, s.tensor) for s in states if s.name == kind)
            whole = gather_fragments(pieces, self.ctx)
            found |= {f"{kind} {name}": tensor for name, tensor in whole.items()}
        return found


@dataclass
class Outcome:
    """What a run left."""

    whole: dict[str, Tensor]
    norms: list[float]
    buckets: int
    cut_rows: int
    """Fragments of this rank that do not hold whole rows."""


def _outcomes(cases: list[Case], tp: int) -> list[Outcome]:
    found = []
    for case in cases:
        run = _Run(case, tp)
        norms = [run.step(number) for number in range(case.steps)]
        fragments = [f for region in run.data_parallel.regions for f in region.fragments]
        assert isinstance(run.data_parallel, GradBuffers)
        cut = sum(
            f.shape[1:] != tuple(run.parameters[f.name].parameter.shape)[1:] for f in fragments
        )
        found.append(Outcome(run.whole(), norms, len(run.data_parallel.buckets), cut))
    return found


def _same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [n for n in expected if not torch.equal(found[n], expected[n])]
    assert not different


def _changed(outcome: Outcome, before: dict[str, Tensor]) -> list[str]:
    return [n for n, x in outcome.whole.items() if n in before and not torch.equal(x, before[n])]


LAYOUTS = [
    (1, 1),
    (1, 2),
    (2, 2),
    *(pytest.param(*sizes, marks=pytest.mark.full) for sizes in ((1, 4), (2, 1), (2, 4))),
]
PAIRS = [Case(model, clip=clip) for model in ("small", "tied, one key head") for clip in (0.0, 0.1)]


@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_zero1_equals_replicated(pool: WorkerPool, tp: int, dp: int) -> None:
    """The same bits, unless clipping multiplies by a norm that was summed in another order."""
    cases = [replace(case, mode=mode) for case in PAIRS for mode in ("zero1", "replicated")]
    ranks = pool.run(_outcomes, tp * dp, cases, tp)
    cut = [sum(rank[i].cut_rows for rank in ranks) for i in range(len(cases))]
    assert all(cut[0::2]) if dp == 4 else dp == 2 or not any(cut)
    assert not any(cut[1::2])
    for case, zero1, replicated in zip(PAIRS, ranks[0][0::2], ranks[0][1::2], strict=True):
        assert zero1.norms == pytest.approx(replicated.norms, rel=1e-6)
        assert max(zero1.norms) > 0.1
        if case.clip == 0.0:
            _same_bits(zero1.whole, replicated.whole)
            continue
        for name, expected in replicated.whole.items():
            if name.startswith("parameter"):
                assert_close(zero1.whole[name], expected, 1e-7, name)


def test_several_buckets_and_overlap(pool: WorkerPool) -> None:
    """At dp 4 with 5 buckets: overlap changes no bit, nor does the mode."""
    cases = [
        Case("wide", steps=4),
        Case("wide", steps=4, overlap=False),
        Case("wide", steps=4, mode="replicated"),
    ]
    ranks = pool.run(_outcomes, 4, cases, 1)
    first, *others = ranks[0]
    assert first.buckets >= 4
    assert sum(rank[0].cut_rows for rank in ranks) >= 4
    for other in others:
        _same_bits(other.whole, first.whole)
        assert other.norms == pytest.approx(first.norms, rel=1e-12)


def _start(model: str, tp: int) -> dict[str, Tensor]:
    return _Run(Case(model), tp).whole()


@pytest.mark.parametrize("frozen", ["embedding", "norm", "layers.0"])
def test_frozen_parameters_stay_and_the_others_train_alike(pool: WorkerPool, frozen: str) -> None:
    cases = [Case(steps=3, frozen=frozen, mode=mode) for mode in ("zero1", "replicated")]
    before = pool.run(_start, 2, "small", 1)[0]
    zero1, replicated = pool.run(_outcomes, 2, cases, 1)[0]
    _same_bits(zero1.whole, replicated.whole)
    parameters = {n: x for n, x in before.items() if n.startswith("parameter")}
    trained = {n for n in parameters if frozen not in n}
    assert 0 < len(trained) < len(parameters)
    assert set(_changed(zero1, parameters)) == trained


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.full)])
def test_remainders_train_as_masters_do(pool: WorkerPool, tp: int, dp: int) -> None:
    """20 bf16 steps with clipping and weight decay, two in a row and one alone skipped."""
    lean = replace(BF16, master_weights="remainder")
    cases = [
        Case(clip=0.1, precision=precision, steps=20, spoiled=(4, 5, 12))
        for precision in (BF16, lean)
    ]
    full, found = pool.run(_outcomes, tp * dp, cases, tp)[0]
    assert str(found.norms) == str(full.norms)  # some are nan
    masters = 0
    for name, expected in full.whole.items():
        kind, parameter = name.split()
        if kind == "master":
            values = found.whole[f"parameter {parameter}"]
            joined = join_master(values, found.whole[f"master_remainder {parameter}"])
            assert torch.equal(joined, expected), name
            masters += 1
        else:
            assert torch.equal(found.whole[name], expected), name
    assert masters == len(full.whole) // 4


# ---- Gathering updated parameters ----------------------------------------------------------------


class _LateGather:
    """A gather that brings nothing until it is awaited: till then, what other ranks have is NaN."""

    pending: dict[int, "_LateGather"]
    """Those that have not been awaited, by the address of what they fill."""

    def __init__(self, whole: Tensor, axis: Axis, pending: dict[int, "_LateGather"]) -> None:
        assert whole.data_ptr() not in pending, "the parameters' last gather was never awaited"
        self._whole, self._axis, self.pending = whole, axis, pending
        own = own_part(whole, axis).clone()
        self._gathered = torch.empty_like(whole)
        work = dist.all_gather_into_tensor(self._gathered, own, group=axis.group, async_op=True)
        assert work is not None
        self._work = work
        whole.fill_(float("nan"))
        own_part(whole, axis).copy_(own)
        pending[whole.data_ptr()] = self

    def wait(self) -> None:
        """Bring the values; once."""
        del self.pending[self._whole.data_ptr()]
        self._work.wait()
        own = own_part(self._whole, self._axis).view(torch.uint8)
        then = own_part(self._gathered, self._axis).view(torch.uint8)
        assert torch.equal(own, then), "parameters were updated while they were gathered"
        self._whole.copy_(self._gathered)


def _late(patch: pytest.MonkeyPatch) -> dict[int, _LateGather]:
    pending: dict[int, _LateGather] = {}

    def start(whole: Tensor, axis: Axis) -> Any:
        return _LateGather(whole, axis, pending)

    patch.setattr("core.data_parallel.buffers.start_all_gather_in_place", start)
    return pending


def _late_outcomes(cases: list[Case], tp: int) -> list[Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        _late(patch)
        return _outcomes(cases, tp)


FULL_RECOMPUTE = RecomputeConfig(granularity="full", num_layers=1)


@pytest.mark.parametrize(("tp", "dp"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.full)])
def test_no_parameter_is_read_before_its_gather(pool: WorkerPool, tp: int, dp: int) -> None:
    """A parameter read too early would be NaN."""
    cases = [
        Case(steps=3),
        Case("tied, one key head", steps=3),
        Case("wide", steps=3),
        Case("small", steps=3, recompute=FULL_RECOMPUTE),
    ]
    late = pool.run(_late_outcomes, tp * dp, cases, tp)[0]
    for found, expected in zip(late, pool.run(_outcomes, tp * dp, cases, tp)[0], strict=True):
        assert found.norms == expected.norms
        _same_bits(found.whole, expected.whole)


def _gathers_of_a_step() -> tuple[list[bool], int, int, bool]:
    """Of the modules with parameters, in the order in which they are used after a step: whether all
    they hold is whole when they begin; gathers pending before, after the first, and at the end.
    """
    with pytest.MonkeyPatch.context() as patch:
        pending = _late(patch)
        run = _Run(Case("wide"), 1)
        run.step(0)
        before = len(pending)
        counts: list[int] = []
        whole: list[bool] = []
        for module in run.model.modules():
            held = list(module.parameters(recurse=False))
            if held:

                def look(*_: Any, held: Any = tuple(held)) -> None:
                    counts.append(len(pending))
                    whole.append(all(bool(p.isfinite().all()) for p in held))

                module.register_forward_pre_hook(look)  # after the one that waits
        tokens = torch.arange(SEQUENCE)[None]
        with torch.no_grad():
            run.model(tokens, tokens, None)
        return whole, before, counts[0], not pending


def test_evaluation_after_a_step_sees_updated_parameters_as_they_come(pool: WorkerPool) -> None:
    for whole, before, first, done in pool.run(_gathers_of_a_step, 2):
        assert all(whole)
        assert len(whole) > 10
        assert 0 < first < before  # the first module waits for its own bucket only
        assert done


def _awaited(overlap: bool) -> tuple[bool, bool]:
    """Whether parameters are whole right after a step, and after `wait_for_parameters`."""
    with pytest.MonkeyPatch.context() as patch:
        _late(patch)
        run = _Run(Case(overlap=overlap), 1)
        run.step(0)

        def whole() -> bool:
            return all(bool(p.isfinite().all()) for p in run.model.parameters())

        before = whole()
        run.data_parallel.wait_for_parameters()
        run.data_parallel.wait_for_parameters()  # a second time does nothing
        return before, whole()


@pytest.mark.parametrize("overlap", [True, False])
def test_parameters_can_be_awaited(pool: WorkerPool, overlap: bool) -> None:
    assert pool.run(_awaited, 2, overlap) == [(not overlap, True)] * 2


def _steps_without_forward() -> bool:
    """Two updates between which no module was used."""
    with pytest.MonkeyPatch.context() as patch:
        _late(patch)
        run = _Run(Case(), 1)
        run.step(0)
        run.data_parallel.begin_step(1)
        for region in run.data_parallel.regions:
            region.main_grad.fill_(1.0)
        assert bool(run.optimizer.step(1e-3, 0.1).applied)
        run.whole()
        return True


def test_parameters_that_no_module_used_are_awaited_before_their_update(pool: WorkerPool) -> None:
    assert pool.run(_steps_without_forward, 2) == [True, True]
