"""How products under sequence parallelism hide the communication of the sequence
(`--parallel.tp-overlap`).

Legend: t tokens of the whole sequence, n and m the widths of a product's input and result.
"""

from typing import Any

from torch import Tensor

from core.config.parallel import TpOverlap
from core.layers.products import Factor, OneAfterTheOther, Product
from core.parallel.context import Axis


class SymmetricMemory(OneAfterTheOther):
    """In torch's fused operations, which copy pieces between GPUs without a communicator's kernels.

    Only for products in the format of the activations. The multicast of NVLink is not used: torch
    does so only for gathers whose result is not asked for, and `ParallelContext` sees it turned
    off. It gains 2.5 % at tp 2 and loses 9 % at tp 4.
    """

    def of_gathered(self, part: Factor, product: Product, axis: Axis) -> tuple[Tensor, Factor]:
        """See `OneAfterTheOther`."""
        (x,) = part.by_token
        whole, (y,) = _fused().fused_all_gather_matmul(
            x, [_matrix(product)], 0, _name(axis), return_A=True
        )
        return y if product.bias is None else y.add_(product.bias), Factor((whole,))

    def scattered(self, x: Factor, product: Product, axis: Axis) -> Tensor:
        """See `OneAfterTheOther`."""
        (rows,) = x.by_token
        return _fused().fused_matmul_reduce_scatter(rows, _matrix(product), "sum", 0, _name(axis))


def _matrix(product: Product) -> Tensor:
    """`[n, m]`."""
    weight: Tensor = product.weight
    return weight if product.gradient else weight.t()


def _fused() -> Any:
    import torch.distributed._symmetric_memory  # defines the operations

    return torch.ops.symm_mem


def _name(axis: Axis) -> str:
    assert axis.group is not None
    return axis.group.group_name


OVERLAPS: dict[TpOverlap, OneAfterTheOther] = {
    "none": OneAfterTheOther(),
    "symmetric_memory": SymmetricMemory(),
}
