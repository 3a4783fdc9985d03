import pytest
import torch
from torch import nn

from core.errors import ConfigError
from core.parallel.random import ZEROS, normal_init
from core.parallel.sharding import (
    Block,
    Box,
    BoxCopy,
    Declaration,
    declare_parameter,
    declared_parameters,
    padded_vocab_rows,
    split_blocks,
    split_units,
    split_vocab,
    tie_chunks,
    whole_copy,
)

CPU = torch.device("cpu")


def test_box_arithmetic() -> None:
    a, b = Box((0, 2), (4, 4)), Box((2, 0), (4, 4))
    assert a.intersect(b) == Box((2, 2), (2, 2))
    assert a.intersect(Box((4, 2), (1, 1))) is None
    assert Box((5, 6), (1, 1)).relative_to(Box((5, 4), (9, 9))) == Box((0, 2), (1, 1))
    x = torch.arange(24).view(4, 6)
    assert torch.equal(x[Box((1, 2), (2, 3)).slices], x[1:3, 2:5])
    assert Box.whole(()).numel == 1


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


def _module(**kwargs: object) -> nn.Module:
    module = nn.Module()
    shape = (4, 2)
    declare_parameter(
        module,
        "weight",
        shape,
        Declaration(shape, whole_copy(shape), ZEROS, **kwargs),  # type: ignore[arg-type]
        dtype=torch.float32,
        device=CPU,
    )
    return module


def test_names_follow_the_tree_or_are_given() -> None:
    model = nn.Module()
    model.a = _module()
    model.b = _module(global_name="elsewhere.weight")
    model.c = model.a  # shared: appears once
    assert list(declared_parameters(model)) == ["a.weight", "elsewhere.weight"]


def test_name_clash_and_undeclared_parameter() -> None:
    model = nn.Module()
    model.a, model.b = _module(global_name="x"), _module(global_name="x")
    with pytest.raises(ValueError, match="global name x"):
        declared_parameters(model)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="not made by declare_parameter"):
        declared_parameters(model)


def test_copies_must_fit() -> None:
    copies = (BoxCopy(Box((0,), (3,)), Box((2,), (3,))),)
    with pytest.raises(ValueError, match="does not fit"):
        declare_parameter(
            nn.Module(),
            "w",
            (3,),
            Declaration((4,), copies, ZEROS),
            dtype=torch.float32,
            device=CPU,
        )


def test_pieces_on_one_rank_share_what_both_hold() -> None:
    def piece(*names: str) -> nn.Module:
        module = nn.Module()
        for name in names:
            declaration = Declaration((2,), whole_copy((2,)), normal_init(1.0), global_name=name)
            attribute = name.replace(".", "_")
            declare_parameter(module, attribute, (2,), declaration, dtype=torch.float32, device=CPU)
        return module

    chunks = [piece("table", "a"), piece("b", "table")]
    with pytest.raises(ValueError, match="two parameters have the global name table"):
        declared_parameters(*chunks)
    tie_chunks(chunks)
    found = declared_parameters(*chunks)
    assert list(found) == ["table", "a", "b"]
    assert found["table"].modules == tuple(chunks)
    assert found["a"].modules == (chunks[0],)
    assert chunks[0].get_parameter("table") is chunks[1].get_parameter("table")
