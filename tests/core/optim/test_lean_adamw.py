"""AdamW with little memory: remainders for masters, bf16 moments, state cut over ranks. Ranks are
played one after the other: an update communicates nothing."""

import gc
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.config.optimizer import OptimizerConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.buffers import GradBuffers
from core.data_parallel.fragments import cut_fragments
from core.data_parallel.regions import Fragment, Region
from core.optim.adamw import AdamW
from core.optim.rounding import join_master
from core.optim.rounding_draws import _box_rows, rows_by_index
from core.parallel.context import Axis, ParallelContext
from core.parallel.cutting import Block, split_blocks, split_vocab, whole_copy
from core.parallel.placement import initialize_parameters
from core.parallel.random import ONES, normal_init
from core.parallel.sharding import (
    BoxCopy,
    Declaration,
    ParamSharding,
    declare_parameter,
    declared_parameters,
)
from core.testing.parity import assemble

CPU = torch.device("cpu")
HEADS = (Block(4, 2), Block(1, 2), Block(2, 2))
FULL = PrecisionConfig()
REMAINDER = PrecisionConfig(master_weights="remainder")
NARROW = PrecisionConfig(moments="bf16")
LEAN = PrecisionConfig(master_weights="remainder", moments="bf16")
SKIPPED = (3, 4, 11)


class _Toy(nn.Module):
    """Every way in which layers cut a parameter, with widths that no alignment divides."""

    def __init__(self, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        rank, size = ctx.tp.rank, ctx.tp.size
        rows, copies = split_vocab(131, rank, size, 6)  # with padding
        self._declare("table", (131, 6), (rows, 6), copies)
        rows, copies = split_blocks([Block(600)], rank, size, other=(70,))  # more than one chunk
        self._declare("column", (600, 70), (rows, 70), copies)
        width, copies = split_blocks([Block(160)], rank, size, dim=1, other=(700,))
        self._declare("row", (700, 160), (700, width), copies)
        rows, copies = split_blocks(HEADS, rank, size, other=(37,))
        self._declare("qkv", (14, 37), (rows, 37), copies)
        width, copies = split_blocks(HEADS, rank, size, dim=1, other=(9,))
        self._declare("strided", (9, 14), (9, width), copies)
        width, copies = split_blocks([Block(16)], rank, size, dim=1, other=(3, 11))
        self._declare("experts", (3, 16, 11), (3, width, 11), copies)
        self._declare("norm", (200,), (200,), whole_copy((200,), "partial"))
        self._declare("scalar", (), (), whole_copy(()))

    def _declare(
        self,
        name: str,
        whole: tuple[int, ...],
        local: tuple[int, ...],
        copies: tuple[BoxCopy, ...],
    ) -> None:
        decay = len(whole) > 1
        init = normal_init(1.0) if whole else ONES
        declaration = Declaration(whole, copies, init, weight_decay=decay)
        declare_parameter(self, name, local, declaration, dtype=self.dtype, device=CPU)


def _context(tp: int = 1, dp: int = 1, rank: int = 0) -> ParallelContext:
    """As rank `rank` of tp x dp sees it, without processes."""
    tp_axis = Axis("tp", tp, rank % tp, tuple(range(tp)), None)
    dp_axis = Axis("dp", dp, rank // tp, tuple(range(dp)), None)
    return replace(ParallelContext.single(), tp=tp_axis, dp=dp_axis)


@lru_cache(maxsize=256)
def _gradient(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + sum(map(ord, name)))
    return torch.randn(shape, generator=generator) * 10.0 ** (step % 3 - 2)


def _set_gradients(regions: tuple[Region, ...], step: int) -> None:
    for region in regions:
        for fragment in region.fragments:
            whole = _gradient(fragment.name, fragment.global_shape, step)
            for copy in fragment.copies:
                to = fragment.view(region.main_grad)[copy.local.slices]
                to.copy_(whole[copy.global_.slices])


def _step(optimizer: AdamW, step: int, *, apply: bool = True) -> None:
    optimizer.step(
        lr=1e-2 * (step + 1),
        weight_decay=0.1,
        grad_scale_inverse=1.0,
        clip_coefficient=0.7,
        apply=torch.tensor(apply),
    )


def _train(regions: tuple[Region, ...], precision: PrecisionConfig, steps: int) -> AdamW:
    optimizer = AdamW(regions, CPU, OptimizerConfig(), precision, seed=5)
    for step in range(steps):
        _set_gradients(regions, step)
        if step in SKIPPED:
            for region in regions:
                region.main_grad[::3] = math.nan
        _step(optimizer, step, apply=step not in SKIPPED)
    return optimizer


Piece = tuple[str, tuple[int, ...], Any, Tensor]


def _pieces(regions: tuple[Region, ...], optimizer: AdamW) -> Iterator[Piece]:
    """Parameters and state of a rank, as `assemble` takes them."""
    values = [
        (f"parameter {fragment.name}", fragment, fragment.view(region.values))
        for region in regions
        for fragment in region.fragments
    ]
    states = [
        (f"{s.name} {s.fragment.name}", s.fragment, s.tensor) for s in optimizer.state_tensors()
    ]
    for name, fragment, tensor in values + states:
        for copy in fragment.copies:
            yield name, fragment.global_shape, copy.global_, tensor[copy.local.slices]


def _trained(
    tp: int, dp: int, precision: PrecisionConfig, steps: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Whole parameters and state; all ranks of the layout, one after the other."""
    parts = []
    for rank in range(tp * dp):
        ctx = _context(tp, dp, rank)
        parameters = declared_parameters(_Toy(ctx, dtype))
        initialize_parameters(parameters, seed=1)
        regions = tuple(GradBuffers(parameters, ctx, bucket_mib=1).regions)
        parts.append(list(_pieces(regions, _train(regions, precision, steps))))
    return assemble(parts)


def _same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def _masters(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """fp32 masters by name, whichever way they were kept."""
    return {
        name.split()[1]: join_master(found[f"parameter {name.split()[1]}"], tensor)
        if name.startswith("master_remainder ")
        else tensor
        for name, tensor in found.items()
        if name.startswith("master")
    }


# ---- Remainders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("dp", [1, 2])
def test_remainders_change_no_bit(dp: int, moments: Any) -> None:
    """Over 20 steps, of which three are skipped, two of them in a row."""
    full = _trained(1, dp, replace(FULL, moments=moments), 20)
    found = _trained(1, dp, replace(REMAINDER, moments=moments), 20)
    assert {t.dtype for n, t in found.items() if n.startswith("master")} == {torch.int16}
    _same_bits(_masters(found), _masters(full))
    kept = ("parameter", "exp_avg")
    _same_bits(
        {n: t for n, t in found.items() if n.startswith(kept)},
        {n: t for n, t in full.items() if n.startswith(kept)},
    )
    assert len(_masters(found)) == 8
    # The bits that remainders hold are in use.
    assert any(torch.any(m != m.bfloat16()) for m in _masters(found).values())


def test_loaded_parameters_have_no_remainder() -> None:
    ctx = ParallelContext.single()
    parameters = declared_parameters(_Toy(ctx, torch.bfloat16))
    initialize_parameters(parameters, seed=1)
    regions = tuple(GradBuffers(parameters, ctx, bucket_mib=1).regions)
    optimizer = _train(regions, REMAINDER, 2)
    for declared in parameters.values():
        declared.parameter.data.fill_(3.0)
    optimizer.refresh_master_from_parameters()
    _step(optimizer, 0, apply=False)
    masters = _masters(assemble([list(_pieces(regions, optimizer))]))
    assert len(masters) == 8
    assert all(torch.all(master == 3.0) for master in masters.values())


# ---- bf16 moments --------------------------------------------------------------------------------

LAYOUTS = [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_bf16_moments_are_the_same_bits_at_every_layout(
    tp: int, dp: int, dtype: torch.dtype
) -> None:
    precision = LEAN if dtype == torch.bfloat16 else NARROW
    found = _trained(tp, dp, precision, 5, dtype)
    moments = [tensor.dtype for name, tensor in found.items() if name.startswith("exp_avg")]
    assert moments == [torch.bfloat16] * 16
    _same_bits(found, _reference(precision, dtype))


@lru_cache(maxsize=4)
def _reference(precision: PrecisionConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    return _trained(1, 1, precision, 5, dtype)


def test_the_layouts_cut_rows() -> None:
    """What the tests above rely on."""
    cut = set()
    for rank in range(4):
        ctx = _context(1, 4, rank)
        buffers = GradBuffers(declared_parameters(_Toy(ctx, torch.bfloat16)), ctx, bucket_mib=1)
        for region in buffers.regions:
            for f in region.fragments:
                if len(f.shape) > 1 and f.shape[-1] < f.global_shape[-1]:
                    cut.add(f.name)
    assert len(cut) >= 2


def _region(name: str, whole: Tensor, first: int, stop: int) -> Region:
    """Elements of a tensor as a region of their own, starting at any element."""
    shape = tuple(whole.shape)
    fragments = tuple(
        cut_fragments(ParamSharding(name, shape, whole_copy(shape)), shape, first, stop, 0)
    )
    flat = torch.zeros(fragments[-1].end, dtype=whole.dtype)
    flat[: stop - first] = whole.reshape(-1)[first:stop]
    return Region(flat, torch.zeros_like(flat, dtype=torch.float32), fragments, True)


@pytest.mark.parametrize("shape", [(997,), (41, 23), (23, 128), (5, 7, 29), (2, 3, 5, 31)], ids=str)
def test_bf16_moments_do_not_depend_on_cuts(shape: tuple[int, ...]) -> None:
    rng = random.Random(math.prod(shape))
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    numel, expected = whole.numel(), None
    for number in range(6):
        cuts = sorted({0, numel, *(rng.randrange(1, numel) for _ in range(number))})
        regions = tuple(_region("w", whole, *cut) for cut in itertools.pairwise(cuts))
        found = assemble([list(_pieces(regions, _train(regions, NARROW, 5)))])
        expected = found if expected is None else expected
        _same_bits(found, expected)


def _index_of(fragment: Fragment, copy: BoxCopy, length: int) -> Tensor:
    """Global index of every element of a flat region that is in a copy, else -1."""
    flat = torch.full((length,), -1)
    whole = torch.arange(math.prod(fragment.global_shape)).view(fragment.global_shape)
    fragment.view(flat)[copy.local.slices] = whole[copy.global_.slices]
    return flat


def _check_rows(fragment: Fragment, copy: BoxCopy, length: int) -> int:
    found = torch.full((length,), -1)
    count = 0
    for rows in _box_rows(fragment, copy):
        height, width = rows.shape
        assert rows.name == fragment.name
        part = found[rows.start : rows.stop]
        assert torch.all(part == -1)
        index = rows.first + torch.arange(height)[:, None] * rows.stride + torch.arange(width)
        part.copy_(index.reshape(-1))
        count += 1
    assert torch.equal(found, _index_of(fragment, copy, length))
    return count


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), *LAYOUTS], ids=str)
def test_rows_give_every_element_its_global_index(tp: int, dp: int) -> None:
    for rank in range(tp * dp):
        ctx = _context(tp, dp, rank)
        buffers = GradBuffers(declared_parameters(_Toy(ctx, torch.float32)), ctx, bucket_mib=1)
        for region in buffers.regions:
            rows = [
                _check_rows(fragment, copy, len(region.values))
                for fragment in region.fragments
                for copy in fragment.copies
            ]
            assert len(rows_by_index(region)) == sum(rows)


@pytest.mark.parametrize("seed", range(30))
def test_rows_of_random_boxes(seed: int) -> None:
    """A random box of a random tensor, cut at random elements."""
    rng = random.Random(seed)
    dims = rng.randint(1, 4)
    whole = tuple(rng.randint(1, 7) for _ in range(dims))
    dim, size = rng.randrange(dims), rng.randint(1, 3)
    whole = (*whole[:dim], whole[dim] * size, *whole[dim + 1 :])
    other = whole[:dim] + whole[dim + 1 :]
    for rank in range(size):
        blocks = [Block(whole[dim])]
        cut, copies = split_blocks(blocks, rank, size, dim=dim, other=other)
        local = (*whole[:dim], cut, *whole[dim + 1 :])
        sharding = ParamSharding("w", whole, copies)
        first = rng.randrange(math.prod(local))
        stop = rng.randint(first + 1, math.prod(local))
        for fragment in cut_fragments(sharding, local, first, stop, 17):
            for copy in fragment.copies:
                _check_rows(fragment, copy, fragment.end)


def _one(numel: int, value: float, seed: int = 5, applied: int = 0) -> tuple[Tensor, Tensor]:
    """Both bf16 moments after one step from zero with a constant gradient."""
    region = _region("w", torch.zeros(numel), 0, numel)
    optimizer = AdamW((region,), CPU, OptimizerConfig(), NARROW, seed)
    optimizer.step_count.fill_(applied)
    region.main_grad[:numel] = value
    _step(optimizer, 0)
    by_name = {s.name: s.tensor for s in optimizer.state_tensors()}
    return by_name["exp_avg"], by_name["exp_avg_sq"]


def test_moments_are_unbiased_and_drawn_anew() -> None:
    numel, value = 1 << 16, 0.4321
    scaled = torch.tensor(value) * torch.tensor(0.7)
    ups = []
    for seed, applied in ((5, 0), (5, 1), (6, 0)):
        exact = (scaled * 0.1, scaled * scaled * 0.05)
        for found, expected in zip(_one(numel, value, seed, applied), exact, strict=True):
            low, high = sorted(found.double().unique().tolist())
            assert (
                low
                < float(expected)
                < high
                == torch.nextafter(torch.tensor(low).bfloat16(), torch.tensor(math.inf).bfloat16())
            )
            up = (float(expected) - low) / (high - low)
            sigma = (high - low) * (up * (1 - up) / numel) ** 0.5
            assert abs(float(found.double().mean()) - float(expected)) < 4 * sigma
            ups.append(found.double() == high)
    # Draws of other moments, steps, seeds and neighbouring elements have nothing in common.
    pairs = [*itertools.combinations(ups, 2), *((up, up.roll(1)) for up in ups)]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]
        assert abs(float(correlation)) < 4 / numel**0.5


# ---- Bytes ---------------------------------------------------------------------------------------


def _tensor_bytes() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        # Not fake ones, which other tests leave to the collector.
        if type(found) in (Tensor, nn.Parameter) and not found.is_meta:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("precision", "dp", "expected"),
    [
        (FULL, 1, 18.0),
        (REMAINDER, 1, 16.0),
        (NARROW, 1, 14.0),
        (LEAN, 1, 12.0),
        (FULL, 4, 6.0 + 12.0 / 4),
        (LEAN, 4, 6.0 + 6.0 / 4),
    ],
)
def test_bytes_a_parameter(precision: PrecisionConfig, dp: int, expected: float) -> None:
    """Parameters, gradients and optimizer state that one rank keeps between steps."""
    before = _tensor_bytes()
    ctx = _context(1, dp, dp - 1)
    model = nn.Module()
    count = 0
    for number, shape in enumerate([(512, 1000), (999, 512), (300,)]):
        declaration = Declaration(shape, whole_copy(shape), normal_init(1.0))
        declare_parameter(model, f"w{number}", shape, declaration, dtype=torch.bfloat16, device=CPU)
        count += math.prod(shape)
    buffers = GradBuffers(declared_parameters(model), ctx, bucket_mib=1)
    optimizer = AdamW(buffers.regions, CPU, OptimizerConfig(), precision)
    _step(optimizer, 0)
    assert (_tensor_bytes() - before) / count == pytest.approx(expected, rel=5e-3)
