"""Linear layers cut over the tensor-parallel axis (Shoeybi et al., "Megatron-LM", 2019).

Legend: s sequence, b batch, i input width, o output width; s/tp under sequence parallelism.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.config.parallel import TpOverlap
from core.data_parallel.deferred import put_off
from core.data_parallel.main_grad import accumulate_sum
from core.errors import ConfigError
from core.layers.overlap import OVERLAPS
from core.layers.products import PLAIN, Cut, Factor, Product, Products, gather, start_gather
from core.parallel.collectives import (
    all_reduce,
    start_all_reduce,
    start_reduce_scatter_first,
    wait,
)
from core.parallel.context import Axis, ParallelContext
from core.parallel.cutting import Block, split_blocks, whole_copy
from core.parallel.placement import Placement
from core.parallel.random import ZEROS, Init
from core.parallel.sharding import Declaration, GradKind


@dataclass(frozen=True)
class Plan:
    """How a linear layer runs."""

    axis: Axis
    """The tensor-parallel axis."""
    x: Cut
    """How the input lies over the axis; rows, which are tokens, are gathered first."""
    y: Cut
    """How the output shall lie: by columns, or else as the sum of what all ranks compute."""
    products: Products
    overlap: TpOverlap
    """How the sequence's communication is hidden."""

    @classmethod
    def of(
        cls, ctx: ParallelContext, cut: Literal["input", "output"], products: Products = PLAIN
    ) -> "Plan":
        """Of a layer whose input or output features are cut over tp. On the other side is the
        residual stream: a part of the sequence, or the same on all ranks.
        """
        own: Cut = "columns"
        stream: Cut = "rows" if ctx.sequence_parallel else "alike"
        x, y = (own, stream) if cut == "input" else (stream, own)
        return cls(ctx.tp, x, y, products, ctx.tp_overlap)

    @property
    def weight(self) -> Cut:
        """How the weight lies."""
        return "columns" if self.x == "columns" else "rows"


class _Linear(torch.autograd.Function):
    """`x W^T + b`, with the input's communication in the backward pass hidden behind GEMMs.

    Collectives are started asynchronously: they run on the communicator's own stream and the waits
    order streams, so no environment variable is needed to make them overlap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        plan: Plan,
        training: bool,
    ) -> Tensor:
        axis, products = plan.axis, plan.products
        flat = x.detach().flatten(0, -2).contiguous()
        keeps = training and weight.requires_grad
        factor, kept = products.factors(flat, plan.x, axis, gradient=False, both=keeps)
        ctx.weight, ctx.bias, ctx.plan = weight, bias, plan
        if keeps:
            # The part of the sequence is kept, not the gathered whole: 1 / tp of the memory.
            ctx.save_for_backward(*kept.by_token, *kept.shared)
            ctx.by_token = len(kept.by_token)
        product = _prepared(plan, weight, bias, gradient=False)
        if plan.x == "rows":
            y, _ = OVERLAPS[plan.overlap].of_gathered(factor, product, axis)
        elif plan.y == "rows":
            y = OVERLAPS[plan.overlap].scattered(factor, product, axis)
        else:
            y = product(factor)
            if plan.y == "alike":
                all_reduce(y, axis)
        return y.view(-1, *x.shape[1:-1], y.shape[-1])

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        weight, plan, axis, products = ctx.weight, ctx.plan, ctx.plan.axis, ctx.plan.products
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = grads[0].flatten(0, -2).contiguous()
        dy, dy_kept = products.factors(flat, plan.y, axis, gradient=True, both=needs_weight)
        product = _prepared(plan, weight, None, gradient=True) if needs_x else None
        dx, dweight, dbias, reducing = None, None, None, None
        if plan.y == "rows":
            one = dy_kept is dy
            if product is None:
                dy = gather(dy, axis)
            else:
                dx, dy = OVERLAPS[plan.overlap].of_gathered(dy, product, axis)
            if needs_weight:
                dy_kept = dy if one else gather(dy_kept, axis)
        x, gathering = None, list[dist.Work | None]()
        if needs_weight:
            saved = ctx.saved_tensors
            x = Factor(saved[: ctx.by_token], saved[ctx.by_token :])
            if put_off(weight, _later(plan, weight, dy_kept, x)):
                needs_weight = False
            elif plan.x == "rows":
                x, gathering = start_gather(x, axis)
        if product is not None and dx is None:
            dx = product(dy)
            if plan.x == "alike":
                reducing = start_all_reduce(dx, axis)
            elif plan.x == "rows":
                dx, reducing = start_reduce_scatter_first(dx, axis)
        for work in gathering:
            wait(work)
        if needs_weight:
            dweight = products.weight_gradient(weight, dy_kept, x)
        if needs_bias:
            dbias = accumulate_sum(ctx.bias, flat)
        wait(reducing)
        if dx is not None:
            dx = dx.view(-1, *grads[0].shape[1:-1], dx.shape[-1])
        return dx, dweight, dbias, None, None


def _prepared(plan: Plan, weight: nn.Parameter, bias: Tensor | None, *, gradient: bool) -> Product:
    made = plan.products.weight(weight, plan.weight, plan.axis)
    return Product(plan.products, made, gradient, bias)


def _later(plan: Plan, weight: nn.Parameter, dy: Factor, x: Factor) -> Callable[[], None]:
    """A weight gradient to be computed later, which gathers its input only then; it must not hold
    the graph.
    """

    def compute() -> None:
        whole = gather(x, plan.axis) if plan.x == "rows" else x
        plan.products.weight_gradient(weight, dy, whole)

    return compute


def parallel_linear(
    x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, plan: Plan
) -> Tensor:
    """`x W^T + b` with this rank's part of the weight.

    Communicates in the forward pass (all-gather of an input that is cut by sequence, reduce-scatter
    or all-reduce of an output that is a sum) and in the backward pass (the transposes of these, the
    input's all-gather once more, and the all-reduce of the gradient of an input that is alike).

    Args:
        x: `[s, b, i]`, `[s / tp, b, i]` or `[s, b, i / tp]`, as the plan says.
        weight: `[o / tp, i]`, or `[o, i / tp]` where the input is cut by features.
        bias: `[o / tp]`, for outputs that are cut by features.
        plan: what input and output are, and how they are multiplied.

    Returns:
        `[s, b, o / tp]`, `[s / tp, b, o]` or `[s, b, o]`.
    """
    return _Linear.apply(x, weight, bias, plan, torch.is_grad_enabled())


class ColumnParallelLinear(nn.Module):
    """Linear layer whose output features are cut over tp.

    The output features are a sequence of blocks, each cut by itself, so that a fused `[q|k|v]` or
    `[gate|up]` gives every rank its share of each.
    """

    def __init__(
        self,
        place: Placement,
        in_features: int,
        blocks: Sequence[Block],
        *,
        init: Init,
        bias: bool = False,
        skip_bias_add: bool = False,
        products: Products = PLAIN,
    ) -> None:
        """Make the weight `[sum of blocks / tp, in_features]` and the bias.

        Args:
            place: axes, format and device.
            in_features: input width i.
            blocks: the output features.
            init: how the weight starts; the bias starts at zero.
            bias: whether there is one.
            skip_bias_add: leave the bias out, for the caller to add `self.bias` in a fused
                function.
            products: in which format to multiply.

        Raises:
            ConfigError: a block cannot be divided over tp.
        """
        super().__init__()
        axis = place.ctx.tp
        products.check(place.ctx.device)
        self.plan = Plan.of(place.ctx, "output", products)
        self.skip_bias_add = skip_bias_add
        total = sum(block.rows for block in blocks)
        rows, copies = split_blocks(blocks, axis.rank, axis.size, other=(in_features,))
        weight = Declaration((total, in_features), copies, init)
        self.weight = place.declare(self, "weight", (rows, in_features), weight)
        self.bias: nn.Parameter | None
        if bias:
            copies = split_blocks(blocks, axis.rank, axis.size)[1]
            declaration = Declaration((total,), copies, ZEROS, weight_decay=False)
            self.bias = place.declare(self, "bias", (rows,), declaration)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, i]` (`[s / tp, b, i]` under sequence parallelism) to `[s, b, o / tp]`."""
        bias = None if self.skip_bias_add else self.bias
        return parallel_linear(x, self.weight, bias, self.plan)


class RowParallelLinear(nn.Module):
    """Linear layer whose input features are cut over tp; the parts of the output are summed."""

    def __init__(
        self,
        place: Placement,
        in_block: Block,
        out_features: int,
        *,
        init: Init,
        bias: bool = False,
        skip_bias_add: bool = False,
        products: Products = PLAIN,
    ) -> None:
        """Make the weight `[out_features, in_block / tp]` and the bias, which every rank holds
        whole.

        Args:
            place: axes, format and device.
            in_block: the input features.
            out_features: output width o.
            init: how the weight starts; the bias starts at zero.
            bias: whether there is one; it is added once, after the sum.
            skip_bias_add: leave the bias out, for the caller to add `self.bias` in a fused
                function.
            products: in which format to multiply.

        Raises:
            ConfigError: the input features cannot be divided over tp.
        """
        super().__init__()
        axis = place.ctx.tp
        products.check(place.ctx.device)
        self.plan = Plan.of(place.ctx, "input", products)
        self.skip_bias_add = skip_bias_add
        if in_block.count % axis.size:
            # Fewer units than ranks would be held by several, and the sum would count them again.
            raise ConfigError(
                f"{in_block.count} input units cannot be divided over tensor parallel size "
                f"{axis.size}: choose a --parallel.tp that divides {in_block.count}"
            )
        columns, copies = split_blocks(
            [in_block], axis.rank, axis.size, dim=1, other=(out_features,)
        )
        weight = Declaration((out_features, in_block.rows), copies, init)
        self.weight = place.declare(self, "weight", (out_features, columns), weight)
        self.bias: nn.Parameter | None
        if bias:
            # Under sequence parallelism each rank adds the bias to its own part of the sequence.
            grad: GradKind = "partial" if place.ctx.sequence_parallel else "same"
            shape = (out_features,)
            declaration = Declaration(shape, whole_copy(shape, grad), ZEROS, weight_decay=False)
            self.bias = place.declare(self, "bias", shape, declaration)
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, i / tp]` to `[s, b, o]` (all-reduce) or `[s / tp, b, o]` (reduce-scatter,
        sequence parallel).
        """
        y = parallel_linear(x, self.weight, None, self.plan)
        return y if self.bias is None or self.skip_bias_add else y + self.bias
