from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from core.config.parallel import ParallelConfig
from core.data_parallel.buffers import GradBuffers
from core.optim.gradients import ReplicaGradients
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block, split_blocks, split_vocab, whole_copy
from core.parallel.placement import initialize_parameters
from core.parallel.random import normal_init
from core.parallel.sharding import BoxCopy, Declaration, declare_parameter, declared_parameters
from core.parallel.sharing import SharedBox, Sharing, publish_sharing
from core.testing.distributed import WorkerPool
from core.testing.parity import gather_regions

CPU = torch.device("cpu")
LAYOUTS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 3)]


class _Toy(nn.Module):
    """Every way in which layers cut a parameter."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()
        rank, size = ctx.tp.rank, ctx.tp.size
        heads = (Block(4, 2), Block(1, 2), Block(2, 2))  # fewer k and v heads than ranks
        rows, copies = split_vocab(11, rank, size, 6)  # some rows, or all, are padding
        self._declare("table", (11, 6), (rows, 6), copies)
        rows, copies = split_blocks([Block(8)], rank, size, other=(128,))
        self._declare("column", (8, 128), (rows, 128), copies)
        width, copies = split_blocks([Block(8)], rank, size, dim=1, other=(5,))
        self._declare("row", (5, 8), (5, width), copies)
        rows, copies = split_blocks(heads, rank, size, other=(6,))
        self._declare("qkv", (14, 6), (rows, 6), copies)
        width, copies = split_blocks(heads, rank, size, dim=1, other=(3,))
        self._declare("strided", (3, 14), (3, width), copies)
        self._declare("norm", (6,), (6,), whole_copy((6,), "partial"))
        self._declare("scale", (7,), (7,), whole_copy((7,)))

    def _declare(
        self,
        name: str,
        whole: tuple[int, ...],
        local: tuple[int, ...],
        copies: tuple[BoxCopy, ...],
    ) -> None:
        declaration = Declaration(whole, copies, normal_init(1.0), weight_decay=len(whole) > 1)
        declare_parameter(self, name, local, declaration, dtype=torch.float64, device=CPU)


def _global_gradient(name: str, shape: tuple[int, ...], dp_rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * dp_rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _boxes(model: nn.Module, sharing: Sharing) -> Iterator[tuple[nn.Parameter, SharedBox]]:
    for box in sharing.boxes:
        yield model.get_parameter(box.name), box


def _make(tp: int, sharded: bool) -> tuple[ParallelContext, _Toy, GradBuffers, Sharing]:
    ctx = ParallelContext.create(ParallelConfig(tp=tp), CPU)
    model = _Toy(ctx)
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=1)
    sharing = publish_sharing(parameters, ctx)
    return ctx, model, GradBuffers(parameters, ctx, bucket_mib=1, sharded=sharded), sharing


def _reduce(tp: int, sharded: bool) -> tuple[float, list[tuple[str, int, tuple[int, ...]]]]:
    """Give every box its gradient (a part, where it is partial), reduce, check; the norm, and who
    owns what.
    """
    ctx, model, buffers, sharing = _make(tp, sharded)
    shapes = {n: d.sharding.global_shape for n, d in declared_parameters(model).items()}
    for parameter, box in _boxes(model, sharing):
        whole = _global_gradient(box.name, shapes[box.name], ctx.dp.rank)[box.copy.global_.slices]
        if box.copy.grad == "partial":
            weights = torch.arange(1.0, len(box.ranks) + 1, dtype=torch.float64)
            whole = whole * (weights / weights.sum())[box.ranks.index(sharing.rank)]
        parameter.main_grad[box.copy.local.slices] += whole  # type: ignore[attr-defined]
    buffers.finish()
    gradients = ReplicaGradients(buffers.regions, buffers.counted, sharing, ctx)
    gradients.reduce_partial()
    norm = gradients.norm()
    reduced = gather_regions(buffers, ctx)
    assert reduced.keys() == shapes.keys()
    for name, found in reduced.items():
        expected = sum(_global_gradient(name, shapes[name], dp) for dp in range(ctx.dp.size))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for region in buffers.regions:
        for fragment in region.fragments:
            for copy in fragment.copies:
                fragment.view(region.main_grad)[copy.local.slices] = 0.0
        assert torch.count_nonzero(region.main_grad) == 0
    return float(norm), [(box.name, box.owner, box.ranks) for box in sharing.boxes]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("tp", "dp"), LAYOUTS)
def test_partial_sums_and_norm_are_those_of_whole_tensors(
    pool: WorkerPool, tp: int, dp: int, sharded: bool
) -> None:
    expected = torch.zeros((), dtype=torch.float64)
    for name, declared in declared_parameters(_Toy(ParallelContext.single())).items():
        shape = declared.sharding.global_shape
        expected += sum(_global_gradient(name, shape, rank) for rank in range(dp)).square().sum()  # type: ignore[union-attr]
    results = pool.run(_reduce, tp * dp, tp, sharded)
    for norm, _ in results:
        assert norm == pytest.approx(float(expected.sqrt()), rel=1e-12)
        assert norm == results[0][0]


def test_one_process_needs_no_group() -> None:
    ctx = ParallelContext.single()
    model = _Toy(ctx)
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=1)
    sharing = publish_sharing(parameters, ctx)
    assert sharing.groups == {}
    assert all(sharing.owns(box) and box.ranks == (0,) for box in sharing.boxes)
    buffers = GradBuffers(parameters, ctx, bucket_mib=1)
    for bucket in buffers.buckets:
        bucket.main_grad.copy_(bucket.values)
    gradients = ReplicaGradients(buffers.regions, buffers.counted, sharing, ctx)
    gradients.reduce_partial()
    expected = sum(float(p.detach().square().sum()) for p in model.parameters()) ** 0.5
    assert float(gradients.norm()) == pytest.approx(expected, rel=1e-13)
    # Neighbours join across the gaps between them; only the strided boxes stand alone.
    assert len(gradients._owned) == 3 + len(buffers.buckets)


def test_holders_are_known_in_every_replica(pool: WorkerPool) -> None:
    results = pool.run(_reduce, 4, 2, True)
    for rank, (_, boxes) in enumerate(results):
        replica = (0, 1) if rank < 2 else (2, 3)
        for name, owner, ranks in boxes:
            whole = name in ("norm", "scale")
            assert owner == ranks[0]
            assert ranks in ([replica] if whole else [replica, (rank,)])
    assert ("qkv", 2, (2, 3)) in results[3][1]  # the k head


def test_norm_neither_overflows_nor_loses_small_terms() -> None:
    ctx = ParallelContext.single()
    model = nn.Module()
    shape = (300, 1000)
    declare_parameter(
        model,
        "w",
        shape,
        Declaration(shape, whole_copy(shape), normal_init(1.0)),
        dtype=torch.float32,
        device=CPU,
    )
    parameters = declared_parameters(model)
    buffers = GradBuffers(parameters, ctx, bucket_mib=1)
    gradients = ReplicaGradients(
        buffers.regions, buffers.counted, publish_sharing(parameters, ctx), ctx
    )
    buffers.buckets[0].main_grad.fill_(1e30)
    gap = buffers.buckets[0].main_grad.numel() - 300_000
    buffers.buckets[0].main_grad[300_000:] = 0.0
    assert 0 < gap < 128
    assert float(gradients.norm()) == pytest.approx(1e30 * 300_000**0.5, rel=1e-7)
    buffers.buckets[0].main_grad[:300_000] = 0.1
    buffers.buckets[0].main_grad[0] = 1e5
    expected = (1e10 + 299_999 * float(torch.tensor(0.1)) ** 2) ** 0.5
    assert float(gradients.norm()) == pytest.approx(expected, rel=1e-14)
