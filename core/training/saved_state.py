"""Parameters and optimizer state read from a checkpoint that may keep them in other formats: with
fp32 masters, with the 16 bits that complete bf16 parameters, or as fp32 parameters alone.
"""

import dataclasses
from collections.abc import Iterable

import torch

from core.checkpoint.index import SavedTensor, model_key, optim_key
from core.checkpoint.reader import CheckpointReader
from core.optim.adamw import ParameterState
from core.optim.rounding import join_master, round_master, split_master


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
