"""Run one layer at a layout and collect whole tensors, to be compared with those of one process."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.parallel.context import ParallelContext
from core.parallel.cutting import whole_copy
from core.parallel.placement import initialize_parameters
from core.parallel.random import Init
from core.parallel.sharding import Box, BoxCopy, DeclaredParameter, declared_parameters
from core.testing.parity import assemble, everyone, gather_whole

Cut = Literal["alike", "sequence", "last"]
"""What an activation is over tp. alike: whole on every rank; sequence: cut along dim 0 under
sequence parallelism, otherwise alike; last: the last dim is cut."""

PADDING = 1e3
"""What padding elements of parameters are filled with, to show where they leak."""


@dataclass(frozen=True)
class LayerCase:
    """A layer and what it is fed."""

    module: nn.Module
    forward: Callable[..., Tensor]
    """Takes this rank's part of the inputs."""
    inputs: tuple[tuple[Tensor, Cut], ...] = ()
    """Whole inputs; gradients are taken for them."""
    output: Cut | tuple[BoxCopy, ...] = "sequence"
    """How the output is cut, or which of its features this rank has (the copies of the weight rows
    that make them)."""


def randomize(
    parameters: Mapping[str, DeclaredParameter],
    seed: int = 1,
    init: Init = Init("normal", 0.3, mean=0.2),  # noqa: B008 (frozen)
) -> None:
    """Fill all parameters with numbers that no initialisation gives (norm weights that are not 1,
    biases that are not 0), the same at every layout, and padding with `PADDING`.
    """
    chosen = {name: dataclasses.replace(d, init=init) for name, d in parameters.items()}
    initialize_parameters(chosen, seed)
    for declared in parameters.values():
        padding = torch.ones_like(declared.local, dtype=torch.bool)
        for copy in declared.sharding.copies:
            padding[copy.local.slices] = False
        declared.local[padding] = PADDING


def run_case(case: LayerCase, ctx: ParallelContext) -> dict[str, Tensor]:
    """Forward and backward of a fixed weighted sum of the output.

    Returns:
        On every rank, whole tensors by name: `output`, `input 0` and so on (their gradients), and
        the gradient of every parameter.

    Raises:
        AssertionError: ranks that should agree differ, or a parameter got no gradient.
    """
    parameters = declared_parameters(case.module)
    randomize(parameters)
    results: list[tuple[str, tuple[int, ...], tuple[BoxCopy, ...], Tensor]] = []
    leaves = []
    for i, (whole, cut) in enumerate(case.inputs):
        copies = _copies(cut, tuple(whole.shape), ctx)
        leaf = whole[copies[0].global_.slices].clone().requires_grad_()
        leaves.append((f"input {i}", tuple(whole.shape), copies, leaf))
    output = case.forward(*(leaf for *_, leaf in leaves))
    shape, copies = _output_copies(case.output, tuple(output.shape), ctx)
    results.append(("output", shape, copies, output.detach()))
    (output * _loss_weights(shape, copies, output, ctx)).sum().backward()
    for name, whole_shape, cut_copies, leaf in leaves:
        assert leaf.grad is not None, f"{name} got no gradient"
        results.append((name, whole_shape, cut_copies, leaf.grad))
    gradients = {}
    for name, declared in parameters.items():
        assert declared.parameter.grad is not None, f"{name} got no gradient"
        gradients[name] = declared.parameter.grad
    mine = [
        (name, whole_shape, copy.global_, values[copy.local.slices])
        for name, whole_shape, parts, values in results
        for copy in parts
    ]
    found = assemble(everyone(mine, ctx))
    return found | gather_whole(parameters, ctx, gradients, sum_partial=True)


def _cut_dim(cut: Cut, dims: int, ctx: ParallelContext) -> int | None:
    if cut == "last":
        return dims - 1
    return 0 if cut == "sequence" and ctx.sequence_parallel else None


def _copies(cut: Cut, whole: tuple[int, ...], ctx: ParallelContext) -> tuple[BoxCopy, ...]:
    dim = _cut_dim(cut, len(whole), ctx)
    if dim is None:
        return whole_copy(whole)
    start, shape = [0] * len(whole), list(whole)
    shape[dim] //= ctx.tp.size
    start[dim] = ctx.tp.rank * shape[dim]
    return (BoxCopy(Box.whole(shape), Box(tuple(start), tuple(shape))),)


def _output_copies(
    output: Cut | tuple[BoxCopy, ...], local: tuple[int, ...], ctx: ParallelContext
) -> tuple[tuple[int, ...], tuple[BoxCopy, ...]]:
    """Shape of the whole output, and the copies that this rank has of it."""
    if isinstance(output, str):
        whole = list(local)
        dim = _cut_dim(output, len(local), ctx)
        if dim is not None:
            whole[dim] *= ctx.tp.size
        return tuple(whole), _copies(output, tuple(whole), ctx)
    lead = local[:-1]

    def features(rows: Box) -> Box:
        return Box((0,) * len(lead) + rows.start[:1], lead + rows.shape[:1])

    copies = tuple(BoxCopy(features(c.local), features(c.global_), c.grad) for c in output)
    ends = [c.global_.start[0] + c.global_.shape[0] for c in output]
    return (*lead, max(max(rank, default=0) for rank in everyone(ends, ctx))), copies


def _loss_weights(
    shape: tuple[int, ...], copies: tuple[BoxCopy, ...], output: Tensor, ctx: ParallelContext
) -> Tensor:
    """What the output is multiplied by; a feature that several ranks hold is shared out, for each
    of them feeds a part of what comes after.
    """
    whole = torch.arange(1, torch.Size(shape).numel() + 1, dtype=output.dtype).view(shape).cos()
    boxes = [copy.global_ for copy in copies]
    held = [box for rank in everyone(boxes, ctx) for box in rank]
    weights = torch.zeros_like(output)
    for copy in copies:
        share = 1 / held.count(copy.global_) if copy.grad == "partial" else 1.0
        weights[copy.local.slices] = whole[copy.global_.slices] * share
    return weights
