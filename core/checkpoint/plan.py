"""Who writes what: every distinct box of a global tensor is written once, by one of its holders.

The only part of a save that needs the descriptions of all ranks. It depends on layout alone, so a
run makes it once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from core.checkpoint.index import SavedTensor, TensorRecord, uncovered
from core.errors import CheckpointError
from core.parallel.sharding import Box

OwnedBox = tuple[str, Box]
"""Name of a tensor and one of its boxes."""


@dataclass(frozen=True)
class Claim:
    """What one rank holds of one global tensor."""

    shape: tuple[int, ...]
    """Of the global tensor."""
    dtype: torch.dtype
    boxes: tuple[Box, ...]


Claims = Mapping[str, Claim]
"""What one rank holds, by name."""


def claim(tensors: Iterable[SavedTensor]) -> Claims:
    """Describe what this rank holds. Several tensors of one name are pieces of one global tensor.

    Raises:
        CheckpointError: tensors of one name differ in global shape or dtype.
    """
    found: dict[str, Claim] = {}
    for saved in tensors:
        shape, dtype = tuple(saved.global_shape), saved.tensor.dtype
        before = found.get(saved.name, Claim(shape, dtype, ()))
        if (before.shape, before.dtype) != (shape, dtype):
            raise CheckpointError(
                f"cannot save {saved.name}: one piece is of a tensor {before.dtype} "
                f"{before.shape}, another of {dtype} {shape}"
            )
        boxes = (copy.global_ for copy in saved.copies if copy.global_.numel)
        found[saved.name] = Claim(shape, dtype, tuple(dict.fromkeys((*before.boxes, *boxes))))
    return found


def assign_owners(claims: Sequence[Claims]) -> list[list[OwnedBox]]:
    """Share the boxes out so that all ranks write about as many bytes.

    Boxes with few holders come first, as they leave no choice, then large before small (the
    longest-processing-time rule of Graham, 1969); each goes to the holder with the fewest bytes so
    far, among equals to the lowest rank.

    Returns:
        By rank, the boxes that it writes, in the order of its claims.
    """
    holders: dict[OwnedBox, list[int]] = {}
    sizes: dict[OwnedBox, int] = {}
    for rank, held in enumerate(claims):
        for name, described in held.items():
            for box in described.boxes:
                holders.setdefault((name, box), []).append(rank)
                sizes[name, box] = box.numel * described.dtype.itemsize
    load = [0] * len(claims)
    owner: dict[OwnedBox, int] = {}
    for key in sorted(holders, key=lambda key: (len(holders[key]), -sizes[key], key)):
        owner[key] = min(holders[key], key=lambda rank: (load[rank], rank))
        load[owner[key]] += sizes[key]
    return [
        [
            (name, box)
            for name, described in held.items()
            for box in described.boxes
            if owner[name, box] == rank
        ]
        for rank, held in enumerate(claims)
    ]


@dataclass(frozen=True)
class RankFile:
    """The file of one rank."""

    name: str
    boxes: tuple[OwnedBox, ...]
    """In the order in which they lie in the file; none if the rank writes no file."""
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Key to dtype and shape, in the same order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all boxes."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.entries.values())


@dataclass(frozen=True)
class Plan:
    """What every rank writes."""

    tensors: Mapping[str, TensorRecord]
    files: Sequence[RankFile]
    """By rank."""


def make_plan(claims: Sequence[Claims]) -> Plan:
    """Plan a save from what all ranks hold. Every rank that calls this gets the same plan.

    Raises:
        CheckpointError: the ranks do not agree on a tensor's shape or dtype, or part of a tensor is
            held by none.
        ValueError: a rank holds overlapping boxes that start at the same index.
    """
    kinds: dict[str, Claim] = {}
    for rank, held in enumerate(claims):
        for name, own in held.items():
            first = kinds.setdefault(name, own)
            if (first.shape, first.dtype) != (own.shape, own.dtype):
                raise CheckpointError(
                    f"cannot save {name}: it is {own.dtype} {own.shape} on rank {rank} and "
                    f"{first.dtype} {first.shape} on a lower one"
                )
    files = [_rank_file(rank, owned, kinds) for rank, owned in enumerate(assign_owners(claims))]
    boxes: dict[str, list[tuple[Box, str]]] = {}
    for file in files:
        for name, box in file.boxes:
            boxes.setdefault(name, []).append((box, file.name))
    tensors = {}
    for name, kind in kinds.items():
        stored = sorted(boxes.get(name, ()))
        holes = uncovered(Box.whole(kind.shape), (box for box, _ in stored))
        if holes:
            raise CheckpointError(
                f"cannot save {name} of shape {kind.shape}: no rank holds {holes[0]}"
            )
        tensors[name] = TensorRecord(kind.shape, kind.dtype, tuple(stored))
    return Plan(tensors, files)


def _rank_file(rank: int, owned: Iterable[OwnedBox], kinds: Mapping[str, Claim]) -> RankFile:
    # Bodies of falling item size are aligned.
    ordered = tuple(sorted(owned, key=lambda key: -kinds[key[0]].dtype.itemsize))
    entries = {box_key(name, box): (kinds[name].dtype, box.shape) for name, box in ordered}
    if len(entries) < len(ordered):
        raise ValueError(f"rank {rank}: overlapping boxes of a tensor start at the same index")
    return RankFile(rank_file_name(rank), ordered, entries)


def rank_file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def box_key(name: str, box: Box) -> str:
    """Key of a box in a file: the name and where the box starts in the global tensor."""
    return f"{name}@{','.join(map(str, box.start))}"
