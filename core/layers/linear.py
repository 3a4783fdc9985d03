"""Linear layers cut over the tensor-parallel axis (Shoeybi et al., "Megatron-LM", 2019).

Legend: s sequence, b batch, i input width, o output width; s/tp under sequence parallelism.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.data_parallel.main_grad import accumulate_product, accumulate_sum, put_off
from core.errors import ConfigError
from core.parallel.collectives import (
    all_gather_first,
    reduce_from,
    reduce_scatter_sequence,
    start_all_gather_first,
    start_all_reduce,
    start_reduce_scatter_first,
    wait,
)
from core.parallel.context import Axis
from core.parallel.placement import Placement
from core.parallel.random import ZEROS, Init
from core.parallel.sharding import (
    Block,
    Declaration,
    GradKind,
    declare_parameter,
    split_blocks,
    whole_copy,
)

InputKind = Literal["alike", "sequence", "own"]
"""What the input of a linear is over the axis. alike: the same on all ranks, so input gradients
are all-reduced; sequence: a part of the sequence, gathered before and reduce-scattered in the
backward pass; own: this rank's own."""


class _Linear(torch.autograd.Function):
    """`x W^T + b`, with the input's communication hidden behind the weight gradient's GEMM.

    Collectives are started asynchronously: they run on the communicator's own stream and the waits
    order streams, so no environment variable is needed to make them overlap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        axis: Axis,
        kind: InputKind,
    ) -> Tensor:
        # The part of the sequence is kept, not the gathered whole: 1 / tp of the memory.
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.axis, ctx.kind = weight, bias, axis, kind
        whole = all_gather_first(x, axis) if kind == "sequence" else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        dy, weight, bias, axis = grads[0].contiguous(), ctx.weight, ctx.bias, ctx.axis
        (x,) = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        flat = dy.flatten(0, -2)
        if needs_weight and put_off(weight, _product(weight, flat, x.detach(), axis, ctx.kind)):
            needs_weight = False
        gathering, reducing = None, None
        if ctx.kind == "sequence" and needs_weight:
            x, gathering = start_all_gather_first(x, axis)
        dx = None
        if needs_x:
            dx = dy @ weight
            if ctx.kind == "alike":
                reducing = start_all_reduce(dx, axis)
            elif ctx.kind == "sequence":
                dx, reducing = start_reduce_scatter_first(dx, axis)
        wait(gathering)
        dweight, dbias = None, None
        if needs_weight:
            dweight = accumulate_product(weight, flat, x.flatten(0, -2))
        if needs_bias:
            dbias = accumulate_sum(bias, flat)
        wait(reducing)
        return dx, dweight, dbias, None, None


def _product(
    weight: nn.Parameter, dy: Tensor, x: Tensor, axis: Axis, kind: InputKind
) -> Callable[[], None]:
    """A weight gradient to be computed later, which gathers its input only then; it must not hold
    the graph.
    """

    def compute() -> None:
        whole = all_gather_first(x, axis) if kind == "sequence" else x
        accumulate_product(weight, dy, whole.flatten(0, -2))

    return compute


def parallel_linear(
    x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, axis: Axis, kind: InputKind
) -> Tensor:
    """`x W^T + b` where the weight is this rank's part of the output features.

    Communicates in the forward pass (all-gather, kind `sequence`) and the backward pass
    (all-gather and reduce-scatter, or all-reduce for kind `alike`).

    Args:
        x: `[s, b, i]`, or `[s / tp, b, i]` for kind `sequence`.
        weight: `[o / tp, i]`.
        bias: `[o / tp]`.
        axis: the tensor-parallel axis.
        kind: what the input is over that axis.

    Returns:
        `[s, b, o / tp]`.
    """
    return _Linear.apply(x, weight, bias, axis, kind)


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

        Raises:
            ConfigError: a block cannot be divided over tp.
        """
        super().__init__()
        self.axis = place.ctx.tp
        self.kind: InputKind = "sequence" if place.ctx.sequence_parallel else "alike"
        self.skip_bias_add = skip_bias_add
        rank, size = self.axis.rank, self.axis.size
        total = sum(block.rows for block in blocks)
        rows, copies = split_blocks(blocks, rank, size, other=(in_features,))
        self.weight = declare_parameter(
            self,
            "weight",
            (rows, in_features),
            Declaration((total, in_features), copies, init),
            dtype=place.dtype,
            device=place.device,
        )
        self.bias: nn.Parameter | None
        if bias:
            self.bias = declare_parameter(
                self,
                "bias",
                (rows,),
                Declaration(
                    (total,), split_blocks(blocks, rank, size)[1], ZEROS, weight_decay=False
                ),
                dtype=place.dtype,
                device=place.device,
            )
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, i]` (`[s / tp, b, i]` under sequence parallelism) to `[s, b, o / tp]`."""
        bias = None if self.skip_bias_add else self.bias
        return parallel_linear(x, self.weight, bias, self.axis, self.kind)


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

        Raises:
            ConfigError: the input features cannot be divided over tp.
        """
        super().__init__()
        self.axis = place.ctx.tp
        self.sequence_parallel = place.ctx.sequence_parallel
        self.skip_bias_add = skip_bias_add
        if in_block.count % self.axis.size:
            # Fewer units than ranks would be held by several, and the sum would count them again.
            raise ConfigError(
                f"{in_block.count} input units cannot be divided over tensor parallel size "
                f"{self.axis.size}: choose a --parallel.tp that divides {in_block.count}"
            )
        columns, copies = split_blocks(
            [in_block], self.axis.rank, self.axis.size, dim=1, other=(out_features,)
        )
        self.weight = declare_parameter(
            self,
            "weight",
            (out_features, columns),
            Declaration((out_features, in_block.rows), copies, init),
            dtype=place.dtype,
            device=place.device,
        )
        self.bias: nn.Parameter | None
        if bias:
            # Under sequence parallelism each rank adds the bias to its own part of the sequence.
            grad: GradKind = "partial" if self.sequence_parallel else "same"
            shape = (out_features,)
            self.bias = declare_parameter(
                self,
                "bias",
                shape,
                Declaration(shape, whole_copy(shape, grad), ZEROS, weight_decay=False),
                dtype=place.dtype,
                device=place.device,
            )
        else:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, i / tp]` to `[s, b, o]` (all-reduce) or `[s / tp, b, o]` (reduce-scatter,
        sequence parallel).
        """
        y = parallel_linear(x, self.weight, None, self.axis, "own")
        y = (reduce_scatter_sequence if self.sequence_parallel else reduce_from)(y, self.axis)
        return y if self.bias is None or self.skip_bias_add else y + self.bias
