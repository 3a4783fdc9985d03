import dataclasses

import pytest
import torch
import torch.nn.functional as F

from core.layers.norm import LayerNorm, RMSNorm, fork, takes_sum
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.recompute import recompute_module
from core.parallel.sharding import declared_parameters
from core.spec import IdentityOp
from core.testing.layouts import randomize

CTX = ParallelContext.single()
PLACE = Placement(CTX, torch.float64, torch.device("cpu"))
X = torch.randn(5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_are_torchs() -> None:
    rms, layer = RMSNorm(PLACE, 8, 1e-3), LayerNorm(PLACE, 8, 1e-3)
    for module in (rms, layer):
        randomize(declared_parameters(module))
    torch.testing.assert_close(rms(X), F.rms_norm(X, (8,), rms.weight, 1e-3))
    torch.testing.assert_close(layer(X), F.layer_norm(X, (8,), layer.weight, layer.bias, 1e-3))


def test_start_as_plain_normalisation_without_weight_decay() -> None:
    module = LayerNorm(PLACE, 8, 1e-3)
    parameters = declared_parameters(module)
    initialize_parameters(parameters, seed=0)
    torch.testing.assert_close(module(X), F.layer_norm(X, (8,), eps=1e-3))
    assert [d.weight_decay for d in parameters.values()] == [False, False]


@pytest.mark.parametrize(
    ("sequence_parallel", "per_head", "grad"),
    [(False, False, "same"), (True, False, "partial"), (False, True, "partial")],
)
def test_gradient_kind(sequence_parallel: bool, per_head: bool, grad: str) -> None:
    ctx = dataclasses.replace(CTX, sequence_parallel=sequence_parallel)
    place = dataclasses.replace(PLACE, ctx=ctx)
    for kind in (RMSNorm, LayerNorm):
        for declared in declared_parameters(kind(place, 8, 1e-3, per_head=per_head)).values():
            assert [copy.grad for copy in declared.sharding.copies] == [grad]


def test_a_fork_is_the_input_and_its_norm() -> None:
    rms, layer, none = RMSNorm(PLACE, 8, 1e-3), LayerNorm(PLACE, 8, 1e-3), IdentityOp()
    for module in (rms, layer):
        randomize(declared_parameters(module))
    for norm in (rms, layer, none):
        hidden, normed = fork(norm, X)
        assert torch.equal(hidden, X)
        assert torch.equal(normed, norm(X))
    extra = torch.arange(8, dtype=torch.float64)
    for norm in (rms, layer):
        for bias in (None, extra):
            total, normed = norm(X, 2 * X, bias, True)
            torch.testing.assert_close(total, 3 * X if bias is None else 3 * X + bias)
            assert torch.equal(normed, norm(total))
    assert [takes_sum(norm) for norm in (rms, layer, none)] == [True, True, False]
    recompute_module(rms)
    assert not takes_sum(rms)
    assert torch.equal(fork(rms, X)[1], rms(X))
