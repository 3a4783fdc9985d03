import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from core.kernels.elementwise import (
    Activation,
    activate,
    add_bias,
    drop,
    layer_norm,
    mlp_activation,
    rms_norm,
    rotary,
)
from core.parallel.random import key_words, make_key, philox

CPU = torch.device("cpu")
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
HF_NAME = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def _random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1).to(dtype)


def _agree(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: list[Tensor], tol: float
) -> None:
    """Outputs and the gradients of all inputs, under a weighted sum."""
    results = []
    for fn in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = fn(*leaves)
        weight = _random(*out.shape, seed=99).to(out.dtype)
        grads = torch.autograd.grad((out * weight).sum(), leaves)
        results.append([out.detach(), *grads])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_rms_norm_in_fp64() -> None:
    x, weight = _random(5, 3, 16), _random(16, seed=1)
    _agree(
        lambda x, w: rms_norm(x, w, 1e-3),
        lambda x, w: F.rms_norm(x, (16,), w, 1e-3),
        [x, weight],
        1e-12,
    )
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_rounds_like_hugging_face(dtype: torch.dtype) -> None:
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(_random(64, seed=1))
    x = 3 * _random(7, 2, 64, dtype=dtype)
    assert torch.equal(rms_norm(x, theirs.weight, 1e-5), theirs(x))


def test_layer_norm_in_fp64() -> None:
    # A mean far from zero: the variance must not be a difference of large numbers.
    x, weight, bias = _random(5, 3, 16) + 1000, _random(16, seed=1), _random(16, seed=2)
    _agree(
        lambda x, w, b: layer_norm(x, w, b, 1e-3),
        lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-3),
        [x, weight, bias],
        1e-10,
    )
    leaves = tuple(y.requires_grad_() for y in (x - 1000, weight, bias))
    assert torch.autograd.gradcheck(lambda x, w, b: layer_norm(x, w, b, 1e-3), leaves)


def test_norms_in_bf16_are_rounded_once() -> None:
    x, weight = _random(50, 64, dtype=torch.bfloat16), _random(64, seed=1, dtype=torch.bfloat16)
    exact = F.layer_norm(x.double(), (64,), weight.double(), weight.double(), 1e-5)
    assert torch.equal(layer_norm(x, weight, weight, 1e-5), exact.to(torch.bfloat16))
    exact = F.rms_norm(x.double(), (64,), weight.double(), 1e-5)
    # Two roundings: before and after the weight.
    error = (rms_norm(x, weight, 1e-5).double() - exact).abs() / exact.abs()
    assert error.max().item() <= 2 * 2.0**-8


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: Activation) -> None:
    x, bias = _random(6, 10), _random(10, seed=1)
    reference = ACT2FN[HF_NAME[kind]]
    _agree(lambda x: activate(x, kind), reference, [x], 1e-12)
    _agree(lambda x: mlp_activation(x, None, kind, False), reference, [x], 1e-12)
    _agree(
        lambda x, b: mlp_activation(x, b, kind, False),
        lambda x, b: reference(x + b),
        [x, bias],
        1e-12,
    )
    leaves = x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: mlp_activation(x, b, kind, False), leaves)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gate_comes_first(kind: Activation) -> None:
    x, bias = _random(6, 10), _random(10, seed=1)
    act = ACT2FN[HF_NAME[kind]]
    _agree(
        lambda x: mlp_activation(x, None, kind, True),
        lambda x: act(x[:, :5]) * x[:, 5:],
        [x],
        1e-12,
    )
    _agree(
        lambda x, b: mlp_activation(x, b, kind, True),
        lambda x, b: act(x[:, :5] + b[:5]) * (x[:, 5:] + b[5:]),
        [x, bias],
        1e-12,
    )
    leaves = x.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: mlp_activation(x, b, kind, True), leaves)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_in_bf16_are_rounded_once(kind: Activation) -> None:
    x = _random(40, 32, dtype=torch.bfloat16)
    bias = _random(32, dtype=torch.bfloat16, seed=1)
    wide = x.float() + bias.float()
    gate, up = wide.chunk(2, dim=-1)
    expected = (activate(gate, kind) * up).to(torch.bfloat16)
    assert torch.equal(mlp_activation(x, bias, kind, True), expected)
    assert torch.equal(
        mlp_activation(x, bias, kind, False), activate(wide, kind).to(torch.bfloat16)
    )


def _angles(s: int, r: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    half = _random(s, r // 2, dtype=dtype, seed=5) * 3
    angles = torch.cat((half, half), -1)
    return angles.cos(), angles.sin()


def _hf_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Hugging Face's function takes `[b, heads, s, d]` and tables with a batch dimension."""
    turned = apply_rotary_pos_emb(
        q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), cos[None], sin[None]
    )
    q, k = (x.permute(2, 0, 1, 3) for x in turned)
    return q, k


@pytest.mark.parametrize("r", [8, 4])
def test_rotary_is_hugging_faces(r: int) -> None:
    """With r below the head size, the dimensions from r on are left as they are."""
    q, k = _random(6, 2, 4, 8), _random(6, 2, 2, 8, seed=1)
    cos, sin = _angles(6, r)

    def theirs(q: Tensor, k: Tensor) -> Tensor:
        turned = _hf_rotary(q[..., :r], k[..., :r], cos, sin)
        parts = [torch.cat((t, x[..., r:]), -1) for t, x in zip(turned, (q, k), strict=True)]
        return torch.cat(parts, dim=2)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(rotary(q, k, cos, sin), dim=2)

    _agree(ours, theirs, [q, k], 1e-12)
    assert torch.autograd.gradcheck(ours, (q.requires_grad_(), k.requires_grad_()))


def test_rotary_in_bf16_turns_in_fp32() -> None:
    q, k = _random(6, 2, 4, 8, dtype=torch.bfloat16), _random(6, 2, 2, 8, dtype=torch.bfloat16)
    cos, sin = _angles(6, 8, torch.float32)
    expected = _hf_rotary(q.float(), k.float(), cos, sin)
    for a, b in zip(rotary(q, k, cos, sin), expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.to(torch.bfloat16))


def test_add_bias() -> None:
    x, bias, residual = _random(5, 4), _random(4, seed=1), _random(5, 4, seed=2)
    _agree(add_bias, lambda x, b, r: x + b + r, [x, bias, residual], 1e-14)
    _agree(lambda x, r: add_bias(x, None, r), torch.add, [x, residual], 1e-14)


def _drop(x: Tensor, rows: Tensor, p: float, key: int = make_key(1, "here")) -> Tensor:
    return drop(x, rows, *key_words(key, CPU), p)


def test_drop_by_its_definition() -> None:
    x, rows = _random(6, 5), torch.tensor([3, 0, 9, 2**33, 7, 8])
    kept = torch.zeros(6, 5, dtype=torch.bool)
    for i, row in enumerate(rows.tolist()):
        for j in range(5):
            word = philox(make_key(1, "here"), torch.tensor(row * 5 + j))[0]
            kept[i, j] = word.item() >= 0.3 * 2**32
    assert 0 < kept.sum() < 30
    _agree(lambda x: _drop(x, rows, 0.3), lambda x: torch.where(kept, x / 0.7, 0.0), [x], 1e-15)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_statistics(p: float) -> None:
    n, h = 500, 400
    out = _drop(torch.ones(n, h, dtype=torch.float64), torch.arange(n), p)
    kept = out > 0
    assert torch.equal(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    deviation = math.sqrt(p * (1 - p) / (n * h))
    assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation
    # Rows and columns are independent of their neighbours.
    centred = kept.double() - (1 - p)
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean().item()) < 4 * p * (1 - p) / math.sqrt(n * h)


def test_drop_of_a_slice_is_the_slice_of_the_whole() -> None:
    x, rows = _random(64, 8), torch.arange(100, 164)
    whole = _drop(x, rows, 0.4)
    assert torch.equal(_drop(x[10:20], rows[10:20], 0.4), whole[10:20])
    other = _drop(x, rows, 0.4, make_key(1, "elsewhere"))
    assert not torch.equal(other == 0, whole == 0)
