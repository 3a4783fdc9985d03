"""Proof that a layout computes what one process computes: collect whole tensors from all ranks and
compare.
"""

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.data_parallel.regions import DataParallel, Fragment
from core.errors import TrainingError
from core.parallel.context import ParallelContext
from core.parallel.sharding import Box, DeclaredParameter, local_boxes
from core.testing.packed import packed


def assemble(parts: list[list[tuple[str, tuple[int, ...], Any, Tensor]]]) -> dict[str, Tensor]:
    """Put the boxes of all ranks together.

    Args:
        parts: of every rank, (name, global shape, global box, values).

    Returns:
        Whole tensors by name. A partial gradient must have been summed before: holders of a box
        must agree.

    Raises:
        AssertionError: a box is missing, or two holders of one differ.
    """
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for rank_parts in parts:
        for name, shape, box, values in rank_parts:
            if name not in whole:
                whole[name] = torch.zeros(shape, dtype=values.dtype)
                filled[name] = torch.zeros(shape, dtype=torch.bool)
            seen = filled[name][box.slices]
            before = whole[name][box.slices][seen]
            assert_close(before, values[seen], 1e-9, f"holders of {name} {box}")
            whole[name][box.slices] = values
            filled[name][box.slices] = True
    for name, mask in filled.items():
        assert bool(mask.all()), f"{name}: {int((~mask).sum())} elements are held by no rank"
    return whole


def gather_whole(
    parameters: Mapping[str, DeclaredParameter],
    ctx: ParallelContext,
    values: Mapping[str, Tensor],
    *,
    sum_partial: bool = False,
) -> dict[str, Tensor]:
    """Whole tensors, on every rank, of something shaped like the parameters (their gradients, say).

    Args:
        parameters: of the model.
        ctx: its context.
        values: by parameter name, local tensors.
        sum_partial: `values` are gradients as autograd left them, whose partial boxes and
            data-parallel parts are still to be summed.
    """
    mine = [
        (
            name,
            d.sharding.global_shape,
            copy.global_,
            values[name].detach()[copy.local.slices].cpu(),
            copy.grad,
        )
        for name, d in parameters.items()
        for copy in d.sharding.copies
    ]
    parts = everyone(mine, ctx)
    if sum_partial:
        parts = _sum_partial(parts, ctx)
    return assemble([[part[:4] for part in rank] for rank in parts])


def gather_fragments(
    pieces: Iterable[tuple[Fragment, Tensor]], ctx: ParallelContext
) -> dict[str, Tensor]:
    """Whole tensors, on every rank, of something that each rank has for its own fragments only
    (optimizer state, say).

    Args:
        pieces: this rank's fragments, each with a tensor of its shape.
        ctx: the process axes.
    """
    mine = [
        (
            fragment.name,
            fragment.global_shape,
            copy.global_,
            tensor[copy.local.slices].clone().cpu(),
        )
        for fragment, tensor in pieces
        for copy in fragment.copies
    ]
    return assemble(everyone(mine, ctx))


def gather_regions(data_parallel: DataParallel, ctx: ParallelContext) -> dict[str, Tensor]:
    """Whole gradients, on every rank, to be called after `finish` and the sum of partial
    gradients.
    """
    return gather_fragments(
        (
            (fragment, fragment.view(region.main_grad))
            for region in data_parallel.regions
            for fragment in region.fragments
        ),
        ctx,
    )


def everyone(mine: Any, ctx: ParallelContext) -> list[Any]:
    """An object of every rank of the world."""
    if ctx.world.size == 1:
        return [mine]
    found: list[Any] = [None] * ctx.world.size
    dist.all_gather_object(found, packed(mine))
    return [pickle.loads(one) for one in found]


def check_copies_agree(parameters: dict[str, DeclaredParameter], ctx: ParallelContext) -> None:
    """Compare the bits of every box over all its holders, data-parallel replicas included.

    Collective: one gather of digests over the world. It copies all parameters to the host.

    Raises:
        TrainingError: on every rank, naming the first tensor whose copies differ.
    """
    digests: dict[tuple[str, Box], bytes] = {}
    for declared, copy in local_boxes(parameters):
        data = declared.local[copy.local.slices].reshape(-1).view(torch.uint8).cpu()
        digests[declared.sharding.name, copy.global_] = hashlib.blake2b(
            data.numpy().tobytes()
        ).digest()
    first: dict[tuple[str, Box], tuple[int, bytes]] = {}
    for rank, found in enumerate(everyone(digests, ctx)):
        for (name, box), digest in found.items():
            holder, expected = first.setdefault((name, box), (rank, digest))
            if digest != expected:
                raise TrainingError(
                    f"{name}: ranks {holder} and {rank} hold different numbers for the box at "
                    f"{box.start} of shape {box.shape}: copies of a parameter must stay equal"
                )


def _sum_partial(parts: list[Any], ctx: ParallelContext) -> list[Any]:
    """Sum over dp replicas, and over the holders of a partial box, with nothing but the
    declarations.
    """
    totals: dict[Any, Tensor] = {}
    counts: dict[Any, int] = {}
    replicas = ctx.dp.size
    for rank in parts:
        for name, _, box, values, _grad in rank:
            totals[name, box] = totals.get((name, box), 0) + values
            counts[name, box] = counts.get((name, box), 0) + 1

    def value(name: str, box: Any, grad: str) -> Tensor:
        total = totals[name, box]
        # `same`: each of the holders in a replica has the whole gradient, so the sum counts it
        # that often.
        return total if grad == "partial" else total / (counts[name, box] // replicas)

    return [
        [(name, shape, box, value(name, box, grad), grad) for name, shape, box, _, grad in rank]
        for rank in parts
    ]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """The largest difference is at most `tolerance` of the largest expected value.

    Raises:
        AssertionError: it is more, or the shapes differ, or a value is not finite.
    """
    assert actual.shape == expected.shape, (
        f"{what}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max().item()
    scale = expected.abs().max().item()
    # Where all is zero (a key bias has no gradient), rounding is measured against 1.
    limit = tolerance * (scale if scale > 1e-12 else 1.0)
    assert difference <= limit, f"{what}: differs by {difference:.3e}, largest value {scale:.3e}"
