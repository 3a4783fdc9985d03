"""Parameters and optimizer state read from a checkpoint that may keep them in other formats: with
fp32 masters, with the 16 bits that complete bf16 parameters, or as fp32 parameters alone. And what
modules keep beside parameters.
"""

import dataclasses
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from core.checkpoint.index import SavedTensor, model_key, module_key, optim_key
from core.checkpoint.reader import CheckpointReader
from core.optim.adamw import ParameterState
from core.optim.rounding import join_master, round_master, split_master
from core.parallel.context import ParallelContext
from core.parallel.sharding import Box, BoxCopy


def saved_state(states: Iterable[ParameterState]) -> list[SavedTensor]:
    """Optimizer state as a checkpoint names it; a parameter may appear in several pieces."""
    return [
        SavedTensor(
            optim_key(state.name, state.fragment.name),
            state.fragment.global_shape,
            state.fragment.copies,
            state.tensor,
        )
        for state in states
    ]


def load_parameters(
    reader: CheckpointReader, parameters: Iterable[SavedTensor], *, remainder: bool = False
) -> None:
    """Fill parameters: bit by bit where the checkpoint has them in the same format, else from the
    widest numbers that it has, rounded as the optimizer rounds.

    Args:
        reader: the checkpoint.
        parameters: destinations, by their names in a checkpoint.
        remainder: the optimizer keeps masters as remainders, which fit one rounding only.

    Raises:
        CheckpointError: see `CheckpointReader.load`.
    """
    alike: list[SavedTensor] = []
    other: list[SavedTensor] = []
    for saved in parameters:
        record = reader.tensors.get(saved.name)
        same = record is None or record.dtype == saved.tensor.dtype
        fits = not remainder or _key("master_remainder", saved) in reader.tensors
        (alike if same and fits else other).append(saved)
    reader.load(alike)
    for saved in other:
        wide = torch.promote_types(saved.tensor.dtype, torch.float32)
        exact = dataclasses.replace(saved, tensor=torch.zeros_like(saved.tensor, dtype=wide))
        _read_exact(reader, exact)
        saved.tensor.copy_(round_master(exact.tensor, saved.tensor.dtype))


def load_state(reader: CheckpointReader, states: Iterable[ParameterState]) -> None:
    """Fill optimizer state, once the parameters are loaded.

    Raises:
        CheckpointError: see `CheckpointReader.load`.
    """
    alike = []
    for saved in saved_state(states):
        kind, name = saved.name.removeprefix("optim/").split("/", 1)
        as_parameter = dataclasses.replace(saved, name=model_key(name))
        if saved.name in reader.tensors:
            alike.append(saved)
        elif kind == "master":
            _read_exact(reader, as_parameter)
        elif kind == "master_remainder":
            exact = torch.zeros_like(saved.tensor, dtype=torch.float32)
            _read_exact(reader, dataclasses.replace(as_parameter, tensor=exact))
            saved.tensor.copy_(split_master(exact)[1])
        else:
            alike.append(saved)
    reader.load(alike, convert=True)


@runtime_checkable
class KeepsScaling(Protocol):
    """A module that carries statistics of past steps along, as FP8 with delayed scaling does."""

    def scaling_state(self) -> dict[str, Tensor]:
        """The tensors by name, as they lie in memory, for a checkpoint to read and to fill."""


class ModuleState:
    """What a model's modules keep beside parameters. Every rank of tp and dp has its own, so it
    fits one size of both only; pp is free, since it goes by module.
    """

    def __init__(self, chunks: Iterable[nn.Module], ctx: ParallelContext) -> None:
        """Find it, as just built.

        Args:
            chunks: the pieces of the model on this rank.
            ctx: the process axes.
        """
        ranks = (ctx.tp.size, ctx.dp.size)
        at = (ctx.tp.rank, ctx.dp.rank)
        self.tensors: list[SavedTensor] = []
        self._paths: set[str] = set()
        for chunk in chunks:
            for path, module in chunk.named_modules():
                self._paths.add(path)
                found = module.scaling_state() if isinstance(module, KeepsScaling) else {}
                for name, tensor in found.items():
                    local = Box.whole((1, 1, *tensor.shape))
                    copy = BoxCopy(local, Box((*at, *local.start[2:]), local.shape))
                    shape = (*ranks, *tensor.shape)
                    key = module_key(f"{path}.{name}")
                    self.tensors.append(SavedTensor(key, shape, (copy,), tensor[None, None]))
        self._fresh = [saved.tensor.clone() for saved in self.tensors]

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> str | None:
        """Fill it, or begin anew where the checkpoint has none that fits.

        Returns:
            A sentence for the log if something was dropped.

        Raises:
            CheckpointError: it is damaged.
        """
        prefix = module_key("")
        there = {
            name: record.shape
            for name, record in reader.tensors.items()
            # Those of other stages are not of this rank.
            if name.startswith(prefix) and name[len(prefix) :].rpartition(".")[0] in self._paths
        }
        if there == {saved.name: saved.global_shape for saved in self.tensors}:
            if self.tensors:
                reader.load(self.tensors)
            return None
        for saved, fresh in zip(self.tensors, self._fresh, strict=True):
            saved.tensor.copy_(fresh)
        return (
            f"{reader.path.name}: the scales of FP8 begin anew, for the checkpoint is of another "
            "backend, recipe or layout"
        )


def _key(kind: str, parameter: SavedTensor) -> str:
    return optim_key(kind, parameter.name.removeprefix(model_key("")))


def _read_exact(reader: CheckpointReader, parameter: SavedTensor) -> None:
    """Fill a wide tensor with the numbers of a parameter, as exact as the checkpoint has them."""
    master, remainder = _key("master", parameter), _key("master_remainder", parameter)
    if master in reader.tensors:
        reader.load([dataclasses.replace(parameter, name=master)], convert=True)
    elif remainder in reader.tensors:
        values = torch.zeros_like(parameter.tensor, dtype=torch.bfloat16)
        bits = torch.zeros_like(parameter.tensor, dtype=torch.int16)
        reader.load(
            [
                dataclasses.replace(parameter, tensor=values),
                dataclasses.replace(parameter, name=remainder, tensor=bits),
            ]
        )
        parameter.tensor.copy_(join_master(values, bits))
    else:
        reader.load([parameter], convert=True)
