import dataclasses
from typing import Any

import pytest
import torch

from core.layers.dropout import BiasDropoutAdd, Dropout
from core.layers.norm import LayerNorm, RMSNorm
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey, philox
from core.parallel.sharding import declared_parameters
from core.testing.layouts import randomize

CTX = ParallelContext.single()
KEY = DropoutKey(seed=5, step=2, first_sample=3)
X = torch.randn(6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_mask_is_a_hash_of_the_index_in_samples_positions_width() -> None:
    s, b, h = X.shape
    out = Dropout(CTX, 0.3, "here")(X, KEY)
    index = torch.arange(100 * s * h).view(100, s, h)[3 : 3 + b].transpose(0, 1)
    kept = philox(KEY.stream("here"), index)[0] >= 0.3 * 2**32
    assert 0 < kept.sum().item() < kept.numel()
    torch.testing.assert_close(out, torch.where(kept, X / 0.7, 0.0), rtol=1e-15, atol=0)


def test_microbatches_draw_the_masks_of_the_batch() -> None:
    module = Dropout(CTX, 0.3, "here")
    whole = module(X, KEY)
    for i in range(4):
        key = dataclasses.replace(KEY, first_sample=3 + i)
        assert torch.equal(module(X[:, i : i + 1], key), whole[:, i : i + 1])


def test_masks_differ_by_seed_step_and_name() -> None:
    ones = torch.ones_like(X)
    masks = {
        tuple((Dropout(CTX, 0.5, name)(ones, key) > 0).flatten().tolist())
        for name, key in (
            ("here", KEY),
            ("there", KEY),
            ("here", dataclasses.replace(KEY, seed=6)),
            ("here", dataclasses.replace(KEY, step=3)),
            ("here", dataclasses.replace(KEY, first_sample=30)),
        )
    }
    assert len(masks) == 5


def test_off_in_evaluation_and_at_zero() -> None:
    assert Dropout(CTX, 0.3, "here")(X, None) is X
    assert Dropout(CTX, 0.0, "here")(X, KEY) is X


def test_bias_dropout_add() -> None:
    bias, residual = torch.randn(5, dtype=torch.float64), torch.randn_like(X)
    module = BiasDropoutAdd(CTX, 0.3, "here")
    torch.testing.assert_close(module(X, bias, residual, None), residual + X + bias)
    torch.testing.assert_close(module(X, None, residual, None), residual + X)
    dropped = module.dropout(X + bias, KEY)
    assert not torch.equal(dropped, X + bias)
    torch.testing.assert_close(module(X, bias, residual, KEY), residual + dropped)
    torch.testing.assert_close(module(X, None, residual, KEY), residual + module.dropout(X, KEY))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_sum_and_its_norm(kind: Any, key: DropoutKey | None, with_bias: bool) -> None:
    norm = kind(Placement(CTX, torch.float64, torch.device("cpu")), 5, 1e-3)
    randomize(declared_parameters(norm))
    bias, residual = (torch.ones(5, dtype=torch.float64) if with_bias else None), X.flip(0)
    module = BiasDropoutAdd(CTX, 0.3, "here")
    total, normed = module.and_norm(X, bias, residual, key, norm)
    assert torch.equal(total, module(X, bias, residual, key))
    assert torch.equal(normed, norm(total))
