from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core.checkpoint.index import SavedTensor
from core.parallel.cutting import Block, split_blocks, split_vocab, whole_copy
from core.parallel.sharding import BoxCopy

HIDDEN, HEAD_DIM, FFN, VOCAB = 8, 4, 12, 19
QKV = (Block(4, HEAD_DIM), Block(2, HEAD_DIM), Block(2, HEAD_DIM))
PAD = -7.0

Shards = list[list[SavedTensor]]
MakeShards = Callable[..., Shards]


def _layouts(rank: int, tp: int) -> list[tuple[str, tuple[int, ...], tuple[BoxCopy, ...]]]:
    """Name, local shape and copies of every kind of cut; global shapes are in GLOBAL."""
    vocab_rows, vocab = split_vocab(VOCAB, rank, tp, HIDDEN)
    qkv_rows, qkv = split_blocks(QKV, rank, tp, other=(HIDDEN,))
    fc1_rows, fc1 = split_blocks((Block(FFN), Block(FFN)), rank, tp, other=(HIDDEN,))
    fc2_columns, fc2 = split_blocks((Block(FFN),), rank, tp, dim=1, other=(HIDDEN,))
    return [
        ("embedding", (vocab_rows, HIDDEN), vocab),
        ("qkv", (qkv_rows, HIDDEN), qkv),
        ("fc1", (fc1_rows, HIDDEN), fc1),
        ("fc2", (HIDDEN, fc2_columns), fc2),
        ("norm", (HIDDEN,), whole_copy((HIDDEN,))),
        ("scale", (), whole_copy(())),
    ]


GLOBAL = {
    "embedding": (VOCAB, HIDDEN),
    "qkv": (8 * HEAD_DIM, HIDDEN),
    "fc1": (2 * FFN, HIDDEN),
    "fc2": (HIDDEN, FFN),
    "norm": (HIDDEN,),
    "scale": (),
}


@pytest.fixture
def whole() -> dict[str, Tensor]:
    """Global tensors of a small model and one of its optimizer states, in two dtypes."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in GLOBAL.items():
        values = torch.randn(shape, generator=generator)
        found[f"model/{name}"] = values.bfloat16()
        found[f"optim/master/{name}"] = values
    return found


def cut(whole: dict[str, Tensor], tp: int, *, empty: bool = False) -> Shards:
    """What each of `tp` ranks holds; empty tensors of that layout are destinations for a load."""
    shards: Shards = []
    for rank in range(tp):
        shard = []
        for name, local_shape, copies in _layouts(rank, tp):
            for key in (f"model/{name}", f"optim/master/{name}"):
                local = torch.full(local_shape, PAD, dtype=whole[key].dtype)
                for copy in copies if not empty else ():
                    local[copy.local.slices] = whole[key][copy.global_.slices]
                shard.append(SavedTensor(key, GLOBAL[name], copies, local))
        shards.append(shard)
    return shards


@pytest.fixture
def make_shards(whole: dict[str, Tensor]) -> MakeShards:
    def make(tp: int, *, empty: bool = False) -> Shards:
        return cut(whole, tp, empty=empty)

    return make


@pytest.fixture
def differences() -> Callable[[Shards, Shards], list[str]]:
    """Names of local tensors that are not bit-equal, padding included."""

    def compare(found: Shards, expected: Shards) -> list[str]:
        return [
            f"rank {rank}: {a.name}"
            for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True))
            for a, b in zip(ours, theirs, strict=True)
            if not torch.equal(a.tensor, b.tensor)
        ]

    return compare
