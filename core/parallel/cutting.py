"""How layers cut parameters over tensor-parallel ranks: which rows or columns a rank holds, as
copies of boxes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ConfigError
from core.parallel.sharding import Box, BoxCopy, GradKind


@dataclass(frozen=True, slots=True)
class Block:
    """A run of `count` units of `unit` rows that are never cut, such as the query heads of a fused
    qkv weight.
    """

    count: int
    unit: int = 1

    @property
    def rows(self) -> int:
        """Rows of the whole block in the global tensor."""
        return self.count * self.unit


def split_units(count: int, rank: int, size: int) -> tuple[int, int, GradKind]:
    """First unit, number of units and gradient kind of `rank` when `count` units are cut over
    `size` ranks.

    Fewer units than ranks are replicated: then each holder sees a part of the gradient.

    Raises:
        ConfigError: neither number divides the other.
    """
    if count % size == 0:
        return rank * (count // size), count // size, "same"
    if size % count == 0:
        return rank * count // size, 1, "partial"
    raise ConfigError(
        f"{count} units cannot be divided over tensor parallel size {size}: choose a "
        f"--parallel.tp that divides {count} or is a multiple of it"
    )


def split_blocks(
    blocks: Sequence[Block], rank: int, size: int, *, dim: int = 0, other: Sequence[int] = ()
) -> tuple[int, tuple[BoxCopy, ...]]:
    """Cut a dimension that is a sequence of blocks; each block is cut by itself (`[q|k|v]`,
    `[gate|up]`).

    Args:
        blocks: the blocks in the order in which they lie in the global tensor; locally they keep
            that order.
        rank: this rank on the tensor-parallel axis.
        size: size of that axis.
        dim: the dimension that is cut.
        other: sizes of all other dimensions, in order.

    Returns:
        The local size of `dim`, and the copies.
    """
    copies = []
    local_at = global_at = 0
    for block in blocks:
        first, units, grad = split_units(block.count, rank, size)
        rows = units * block.unit

        def box(start: int, rows: int = rows) -> Box:
            starts, shape = [0] * len(other), list(other)
            starts.insert(dim, start)
            shape.insert(dim, rows)
            return Box(tuple(starts), tuple(shape))

        copies.append(BoxCopy(box(local_at), box(global_at + first * block.unit), grad))
        local_at += rows
        global_at += block.rows
    return local_at, tuple(copies)


def whole_copy(shape: Sequence[int], grad: GradKind = "same") -> tuple[BoxCopy, ...]:
    """The copies of a parameter that every rank holds whole."""
    return (BoxCopy(Box.whole(shape), Box.whole(shape), grad),)


def padded_vocab_rows(vocab_size: int, size: int) -> int:
    """Rows of a vocabulary-parallel table on each rank: the vocabulary over `size` ranks, rounded
    up.

    A multiple of 128 keeps GEMMs on their fast path; small vocabularies are padded to a multiple
    of 8 only.
    """
    per_rank = -(-vocab_size // size)
    multiple = 128 if per_rank >= 1024 else 8
    return -(-per_rank // multiple) * multiple


def split_vocab(
    vocab_size: int, rank: int, size: int, hidden_size: int, grad: GradKind = "same"
) -> tuple[int, tuple[BoxCopy, ...]]:
    """Local rows and copies of a `[vocab, hidden]` table; padding rows are in no box, a rank may
    own none.
    """
    rows = padded_vocab_rows(vocab_size, size)
    valid = min(max(vocab_size - rank * rows, 0), rows)
    if valid == 0:
        return rows, ()
    shape = (valid, hidden_size)
    return rows, (BoxCopy(Box((0, 0), shape), Box((rank * rows, 0), shape), grad),)
