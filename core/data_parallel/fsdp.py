"""Parameters sharded over dp with torch's `fully_shard` (FSDP2; after Zhao et al., "PyTorch FSDP",
2023, and ZeRO-3 of Rajbhandari et al., 2020).

Each rank keeps its rows of every local parameter in fp32: they are master weights and optimizer
state's shape in one. A layer's parameters are gathered in the format of the computation before its
forward and its backward pass, and freed after each. Its gradients are reduce-scattered in every
microbatch and added, in place, to `main_grad`, to which `.grad` has been set beforehand.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from core.data_parallel.deferred import DeferredProducts
from core.data_parallel.fragments import cut_fragments
from core.data_parallel.regions import Fragment, Region
from core.parallel.context import Axis, ParallelContext
from core.parallel.sharding import DeclaredParameter, declared_parameters
from core.transformer.stack import LayerStack

# It warns of views as outputs, which may not be changed in place. Nothing here does.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class ShardedParameter(DeclaredParameter):
    """A parameter of which this rank keeps some rows; `sharding` describes those."""

    rows: Tensor
    """`[n, ...]`, the same storage for good, whether or not the parameter is gathered."""

    @property
    def local(self) -> Tensor:
        """This rank's rows."""
        return self.rows


class FullyShardedModel:
    """`DataParallel` by `fully_shard` over dp.

    What is gathered and freed as one: every layer of every `LayerStack`, every other part of the
    model that shares no parameter with the rest, and what is left (final norms, tied embeddings).
    Inside a layer, which ranks of tp hold what is not changed.
    """

    def __init__(self, model: nn.Module, ctx: ParallelContext, dtype: torch.dtype) -> None:
        """Shard the parameters of a model, in place. On the meta device they become zeros on the
        context's device, so that no rank ever holds the whole model; otherwise they keep their
        bits.

        Args:
            model: as built, its parameters at least fp32; see `modes.model_placement`.
            ctx: the process axes, with several ranks on dp; gradients are summed over dp.
            dtype: format of the computation.

        Raises:
            ValueError: the model has buffers, which cannot be built on the meta device, or a
                parameter of fewer bits than a master weight.
        """
        assert ctx.dp.group is not None
        if next(model.buffers(), None) is not None:
            raise ValueError("a model to be fully sharded must have no buffers")
        declared = declared_parameters(model)
        for name, one in declared.items():
            if one.parameter.dtype.itemsize < torch.float32.itemsize:
                raise ValueError(f"{name} is {one.parameter.dtype}: build the model in fp32")
        shapes = {name: tuple(d.parameter.shape) for name, d in declared.items()}
        mesh = DeviceMesh.from_group(ctx.dp.group, ctx.device.type)
        self._modules = tuple(_shard(model, mesh, dtype))
        _materialize(model, ctx.device)
        self.counted: Axis = ctx.world
        self.deferred = DeferredProducts()
        self.parameters: dict[str, DeclaredParameter] = {}
        regions = []
        for name, whole in declared.items():
            parameter = whole.parameter
            assert isinstance(parameter, DTensor)
            rows = parameter.to_local().detach()
            fragments = _own_fragments(whole, shapes[name], rows, ctx.dp)
            copies = fragments[0].copies if fragments else ()
            sharding = dataclasses.replace(whole.sharding, copies=copies)
            fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
            self.parameters[name] = ShardedParameter(**{**fields, "sharding": sharding}, rows=rows)
            if parameter.requires_grad:
                main_grad = torch.zeros_like(rows)
                parameter.grad = DTensor.from_local(
                    main_grad,
                    mesh,
                    (Shard(0),),
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                if fragments:
                    flat = rows.view(-1), main_grad.view(-1)
                    regions.append(Region(*flat, fragments, whole.weight_decay))
        self.regions: Sequence[Region] = tuple(regions)

    def begin_step(self, microbatches: int) -> None:
        """Nothing: all microbatches are alike."""

    def finish(self) -> None:
        """Nothing: the end of every backward pass has waited for its reductions."""

    def publish(self, index: int) -> None:
        """Nothing: the next forward pass gathers what it needs."""

    def zero(self) -> None:
        """Clear the gradients of all regions."""
        for region in self.regions:
            region.main_grad.zero_()

    def wait_for_parameters(self) -> None:
        """Free what a forward pass without a backward pass has left gathered."""
        for module in self._modules:
            module.reshard()


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> Iterator[FSDPModule]:
    """Apply `fully_shard` to the parts of a model and to the model."""
    wide = torch.promote_types(dtype, torch.float32)
    # Inputs are not cast: activations have the right format, and rotary tables are fp32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for module in (*_units(model), model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        # The loss has been divided by the number of tokens of all ranks: gradients are summed.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        yield sharded


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """The modules to be gathered one at a time."""
    stacks = [module for module in model.modules() if isinstance(module, LayerStack)]
    layers = [layer for stack in stacks for layer in stack.layers.values()]
    inside = {module for stack in stacks for module in stack.modules()}
    others = [part for part in model.children() if inside.isdisjoint(part.modules())]
    holders = [set(declared.modules) for declared in declared_parameters(model).values()]
    for part in (*layers, *others):
        own = set(part.modules())
        held = [modules for modules in holders if modules & own]
        if held and all(modules <= own for modules in held):
            yield part


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device storage, all zero. They stay the same objects, tied ones
    tied.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()


def _own_fragments(
    whole: DeclaredParameter, shape: tuple[int, ...], rows: Tensor, axis: Axis
) -> tuple[Fragment, ...]:
    """The fragment that this rank's rows of a local tensor of this shape are, if it has any."""
    height = -(-shape[0] // axis.size)
    first = min(axis.rank * height, shape[0])
    assert rows.shape == (min(height, shape[0] - first), *shape[1:])
    start = first * rows[:1].numel()
    return tuple(
        # Nothing follows it in the region.
        dataclasses.replace(fragment, end=fragment.numel)
        for fragment in cut_fragments(whole.sharding, shape, start, start + rows.numel(), 0)
    )
