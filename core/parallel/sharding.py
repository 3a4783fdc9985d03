"""Every parameter is a global tensor; a rank holds some boxes of it.

One declaration, made where the parameter is made, serves initialisation, gradient sums and norm,
checkpoints, resharding and Hugging Face conversion: all of them are copies of boxes. Nothing here
communicates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from core.parallel.random import Init

GradKind = Literal["same", "partial"]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A rectangular index range: `start[d] <= index[d] < start[d] + shape[d]`."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """The box of all indices of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index for a tensor: `tensor[box.slices]` is a view of the box."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    def intersect(self, other: "Box") -> "Box | None":
        """The common part of two boxes, or None where there is none."""
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.start, self.shape, other.start, other.shape, strict=True)
        )
        if any(b <= a for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def relative_to(self, outer: "Box") -> "Box":
        """The same box counted from the first index of `outer`."""
        return Box(tuple(a - o for a, o in zip(self.start, outer.start, strict=True)), self.shape)


@dataclass(frozen=True, slots=True)
class BoxCopy:
    """`local` of this rank's tensor is `global_` of the global tensor; both have one shape."""

    local: Box
    global_: Box
    grad: GradKind = "same"
    """`same`: every holder of this box computes its whole gradient. `partial`: each holder
    computes a part, and the gradient is their sum (norms under sequence parallelism, k and v rows
    of replicated heads)."""


@dataclass(frozen=True, slots=True)
class ParamSharding:
    """What this rank holds of one global parameter. Elements of the local tensor in no copy are
    padding.
    """

    name: str
    """Global name, the same at every layout:
    `decoder.layers.17.self_attention.linear_qkv.weight`."""
    global_shape: tuple[int, ...]
    copies: tuple[BoxCopy, ...]


@dataclass(frozen=True, slots=True)
class Declaration:
    """Said once by the layer that makes a parameter; its name follows from where the layer
    stands.
    """

    global_shape: tuple[int, ...]
    copies: tuple[BoxCopy, ...]
    init: Init
    weight_decay: bool = True
    global_name: str | None = None
    """Set where the name must not follow from the module tree (a tied or a fused parameter)."""
    across_stages: bool = False
    """Other pipeline stages hold it too. Its gradient lies in a bucket of its own, so that all of
    them cut it alike."""


@dataclass(frozen=True)
class DeclaredParameter:
    """A parameter found in a model, with what was declared of it."""

    module: nn.Module
    attribute: str
    sharding: ParamSharding
    init: Init
    weight_decay: bool
    modules: tuple[nn.Module, ...]
    """All modules that hold the parameter: several where it is tied."""
    across_stages: bool
    """Other pipeline stages hold it too."""

    @property
    def parameter(self) -> nn.Parameter:
        """Looked up in the module each time: wrappers such as FSDP2 replace the object, not its
        place.
        """
        found = self.module._parameters[self.attribute]
        assert found is not None
        return found

    @property
    def local(self) -> Tensor:
        """What `sharding` describes: this rank's tensor, detached, sharing memory with the
        parameter.
        """
        return self.parameter.data


def declare_parameter(
    module: nn.Module,
    attribute: str,
    local_shape: Sequence[int],
    declaration: Declaration,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Parameter:
    """Register a parameter of `local_shape` on `module`, and remember its declaration there.

    It is zero until it is initialised or loaded, which fills its boxes alone. So padding is zero,
    as it must be: it takes part in matrix products, through which a stray NaN would spread.

    Raises:
        ValueError: a box leaves the local or the global tensor, or the two boxes of a copy differ
            in shape.
    """
    local, whole = Box.whole(local_shape), Box.whole(declaration.global_shape)
    for copy in declaration.copies:
        if (
            copy.local.shape != copy.global_.shape
            or copy.local.intersect(local) != copy.local
            or copy.global_.intersect(whole) != copy.global_
        ):
            raise ValueError(
                f"{type(module).__name__}.{attribute}: {copy} does not fit a local tensor "
                f"{tuple(local_shape)} of a global tensor {declaration.global_shape}"
            )
    parameter = nn.Parameter(torch.zeros(tuple(local_shape), dtype=dtype, device=device))
    module.register_parameter(attribute, parameter)
    module.__dict__.setdefault("_declarations", {})[attribute] = declaration
    return parameter


def declared_parameters(*chunks: nn.Module) -> dict[str, DeclaredParameter]:
    """All parameters of a model by global name, in module order; a shared parameter appears once.

    Args:
        *chunks: the model, or the pieces of it that a pipeline stage holds, in the model's order.

    Raises:
        ValueError: a parameter was made without `declare_parameter`, or two have one global name.
    """
    found: dict[str, DeclaredParameter] = {}
    holders: dict[int, list[nn.Module]] = {}
    for chunk in chunks:
        for module in chunk.modules():
            for parameter in module.parameters(recurse=False):
                holders.setdefault(id(parameter), []).append(module)
    for name, module, attribute, declaration in _declarations(chunks):
        sharers = holders[id(module._parameters[attribute])]
        if sharers[0] is not module:
            continue
        if declaration is None:
            raise ValueError(f"{name} was not made by declare_parameter")
        if name in found:
            raise ValueError(f"two parameters have the global name {name}")
        found[name] = DeclaredParameter(
            module,
            attribute,
            ParamSharding(name, declaration.global_shape, declaration.copies),
            declaration.init,
            declaration.weight_decay,
            tuple(sharers),
            declaration.across_stages,
        )
    return found


def tie_chunks(chunks: Sequence[nn.Module]) -> None:
    """Let pieces that a rank holds of one model hold one parameter where they declare the same one
    (a tied head in a V, whose two ends lie on the first stage).
    """
    first: dict[str, nn.Parameter | None] = {}
    for name, module, attribute, _ in _declarations(chunks):
        module._parameters[attribute] = first.setdefault(name, module._parameters[attribute])


def _declarations(
    chunks: Sequence[nn.Module],
) -> Iterator[tuple[str, nn.Module, str, Declaration | None]]:
    """Every place of a parameter: its global name, module, attribute and declaration."""
    for chunk in chunks:
        for path, module in chunk.named_modules():
            declared: dict[str, Declaration] = module.__dict__.get("_declarations", {})
            for attribute, _ in list(module.named_parameters(recurse=False)):
                declaration = declared.get(attribute)
                name = f"{path}.{attribute}" if path else attribute
                if declaration is not None:
                    name = declaration.global_name or name
                yield name, module, attribute, declaration


def local_boxes(
    parameters: dict[str, DeclaredParameter],
) -> Iterator[tuple[DeclaredParameter, BoxCopy]]:
    """Every copy of every parameter, in a fixed order."""
    for declared in parameters.values():
        for copy in declared.sharding.copies:
            yield declared, copy
