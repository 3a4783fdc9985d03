import pytest
import torch

from core.errors import ConfigError
from core.parallel.cutting import Block, padded_vocab_rows, split_blocks, split_units, split_vocab
from core.parallel.sharding import Box, BoxCopy


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_blocks_tile_the_global_tensor(tp: int) -> None:
    """8 query heads and 2 key heads of 3 rows: key heads are shared from tp 4 on."""
    blocks = [Block(8, 3), Block(2, 3), Block(2, 3)]
    holders = torch.zeros(36, dtype=torch.int64)
    for rank in range(tp):
        rows, copies = split_blocks(blocks, rank, tp, other=(5,))
        local = torch.zeros(rows, dtype=torch.int64)
        for copy in copies:
            local[copy.local.slices[0]] += 1
            holders[copy.global_.slices[0]] += 1
            assert copy.local.shape[1] == 5
        assert torch.equal(local, torch.ones_like(local))
        assert [c.grad for c in copies[1:]] == ["partial" if tp > 2 else "same"] * 2
    assert torch.equal(holders[:24], torch.ones(24, dtype=torch.int64))
    assert torch.equal(holders[24:], torch.full((12,), max(1, tp // 2)))


def test_cut_along_the_second_dimension() -> None:
    size, copies = split_blocks([Block(6, 2)], 1, 3, dim=1, other=(7,))
    assert size == 4
    assert copies == (BoxCopy(Box((0, 0), (7, 4)), Box((0, 4), (7, 4))),)


def test_units_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"6 units cannot be divided .* size 4"):
        split_units(6, 0, 4)


@pytest.mark.parametrize("vocab", [1, 67, 1000, 128256, 151936])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_vocabulary_rows_are_held_once(vocab: int, tp: int) -> None:
    held = 0
    for rank in range(tp):
        rows, copies = split_vocab(vocab, rank, tp, 3)
        assert rows == padded_vocab_rows(vocab, tp)
        for copy in copies:
            assert copy.global_.start[0] == held
            held += copy.global_.shape[0]
    assert held == vocab
