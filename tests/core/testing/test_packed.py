import pickle

import pytest
import torch
from torch import Tensor, nn

from core.testing.packed import packed

TENSORS = [
    torch.randn(3, 4, dtype=torch.float64).t(),
    torch.randn(6).bfloat16()[::2],
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.empty(0, 5),
    torch.full((2,), float("nan")),
    torch.ones(2, requires_grad=True) * 3,
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype} {tuple(t.shape)}")
def test_tensors_come_back_bit_by_bit(tensor: Tensor) -> None:
    (found,) = pickle.loads(packed([tensor]))
    torch.testing.assert_close(found, tensor.detach(), rtol=0, atol=0, equal_nan=True)
    assert found.dtype == tensor.dtype
    found.zero_()  # memory of its own, which may be written to


def test_whatever_else_comes_back_as_it_does_without() -> None:
    thing = {"parameter": nn.Parameter(torch.ones(2)), "meta": torch.empty(2, device="meta")}
    found = pickle.loads(packed((thing, "text", 1.5)))
    assert found[1:] == ("text", 1.5)
    assert isinstance(found[0]["parameter"], nn.Parameter)
    assert found[0]["meta"].device.type == "meta"
