"""What a layer needs to make its parameters: process axes, number format, device."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from core.parallel.context import ParallelContext
from core.parallel.random import make_key
from core.parallel.sharding import Declaration, DeclaredParameter, declare_parameter


@dataclass(frozen=True)
class Placement:
    """Passed to every layer's constructor. On the meta device a model takes no memory."""

    ctx: ParallelContext
    dtype: torch.dtype
    device: torch.device
    parts: range | None = None
    """The parts of the model that are built here, counted in the order in which data passes them;
    None: all. A pipeline's layout says it."""

    def holds(self, part: int) -> bool:
        """Whether a part of the model is built here."""
        return self.parts is None or part in self.parts

    def declare(
        self,
        module: nn.Module,
        attribute: str,
        local_shape: Sequence[int],
        declaration: Declaration,
    ) -> nn.Parameter:
        """`declare_parameter` of this format, on this device."""
        return declare_parameter(
            module, attribute, local_shape, declaration, dtype=self.dtype, device=self.device
        )


def initialize_parameters(parameters: dict[str, DeclaredParameter], seed: int) -> None:
    """Fill every parameter from its declaration; padding stays zero.

    A box gets the numbers that the whole tensor would have there, so a model starts from the same
    weights at every layout. No communication.
    """
    for name, declared in parameters.items():
        data = declared.local
        for copy in declared.sharding.copies:
            declared.init.fill_(
                data[copy.local.slices],
                make_key(seed, "init", name),
                copy.global_.start,
                declared.sharding.global_shape,
            )
