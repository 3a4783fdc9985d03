import pytest
import torch
from torch import nn

from core.parallel.cutting import (
    whole_copy,
)
from core.parallel.random import ZEROS, normal_init
from core.parallel.sharding import (
    Box,
    BoxCopy,
    Declaration,
    declare_parameter,
    declared_parameters,
    tie_chunks,
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
