import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError
from core.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from core.layers.positions import LearnedPositions
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import ZEROS
from core.parallel.sharding import declared_parameters
from core.testing.layouts import PADDING, randomize

PLACE = Placement(ParallelContext.single(), torch.float64, torch.device("cpu"))
TOKENS = torch.tensor([[0, 66, 5, 5], [1, 5, 66, 2]])


def _table() -> VocabParallelEmbedding:
    module = VocabParallelEmbedding(PLACE, 67, 6, init=ZEROS)
    randomize(declared_parameters(module))
    return module


def test_one_process_is_a_plain_embedding() -> None:
    module = _table()
    assert (module.part.first, module.part.valid, module.part.total) == (0, 67, 67)
    out = module(TOKENS)
    assert torch.equal(out, F.embedding(TOKENS, module.weight).transpose(0, 1))
    weight = torch.randn_like(out)
    (ours,) = torch.autograd.grad((out * weight).sum(), module.weight)
    plain = F.embedding(TOKENS, module.weight).transpose(0, 1)
    (theirs,) = torch.autograd.grad((plain * weight).sum(), module.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_frozen_table_gets_no_gradient() -> None:
    module = _table()
    module.weight.requires_grad_(False)
    assert not module(TOKENS).requires_grad


def test_head_is_a_linear_layer_with_padding_columns_last() -> None:
    module = VocabParallelHead(PLACE, 67, 6, init=ZEROS)
    randomize(declared_parameters(module))
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    logits = module(x)
    assert logits.shape == (4, 2, 72)
    torch.testing.assert_close(logits, F.linear(x, module.weight))
    assert torch.equal(module.weight[67:], torch.full((5, 6), PADDING, dtype=torch.float64))


def test_tied_head_uses_the_table_itself() -> None:
    table = _table()
    head = VocabParallelHead(PLACE, 67, 6, init=ZEROS, tied_to=table)
    assert head.weight is table.weight
    assert head.part is table.part

    def loss(weight: Tensor) -> Tensor:
        return F.linear(F.embedding(TOKENS, weight).transpose(0, 1).tanh(), weight).sin().sum()

    ours = torch.autograd.grad(head(table(TOKENS).tanh()).sin().sum(), table.weight)[0]
    theirs = torch.autograd.grad(loss(table.weight), table.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _positions() -> LearnedPositions:
    module = LearnedPositions(PLACE, 7, 6, init=ZEROS)
    randomize(declared_parameters(module))
    return module


@pytest.mark.parametrize(
    "given", [None, [0, 1, 2, 3], [3, 4, 5, 6], [[0, 1, 2, 3], [0, 1, 0, 1]]], ids=str
)
def test_positions_are_rows_of_their_table(given: list[int] | list[list[int]] | None) -> None:
    module = _positions()
    positions = None if given is None else torch.tensor(given)
    out = module(4, positions)
    rows = torch.tensor(given or [0, 1, 2, 3])
    assert out.shape == (4, rows.shape[0] if rows.dim() == 2 else 1, 6)
    plain = module.weight[rows]
    expected = plain.transpose(0, 1) if rows.dim() == 2 else plain[:, None]
    assert torch.equal(out, expected)
    weight = torch.randn_like(out)
    (ours,) = torch.autograd.grad((out * weight).sum(), module.weight)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), module.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_a_sequence_longer_than_the_table_is_refused() -> None:
    assert _positions()(7).shape[0] == 7
    with pytest.raises(ConfigError, match="8 tokens is longer than the model's 7 learned"):
        _positions()(8)
