import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from core.kernels.attention import attention
from core.kernels.attention_pattern import AttentionDropout, AttentionPattern, visible
from core.kernels.masked_attention import Documents, QueryPositions
from core.parallel.random import DropoutKey, philox

CPU = torch.device("cpu")
S, B, N, D = 9, 2, 4, 8
KEY = DropoutKey(seed=3, step=11, first_sample=6)


def _inputs(groups: int, z: int = S, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(groups)
    shapes = [(S, B, N, D), (z, B, groups, D), (z, B, groups, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def _seen(pattern: AttentionPattern, query: int, key: int) -> bool:
    if not pattern.causal:
        return True
    return key <= query and (pattern.window is None or query - key < pattern.window)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, keep: Tensor | None = None
) -> Tensor:
    """One head, one sample and one query at a time; `keep` `[b, n, s, z]` multiplies weights."""
    s, b, n, _ = q.shape
    repeat = n // k.shape[2]
    rows = []
    for i in range(s):
        keys = [j for j in range(k.shape[0]) if _seen(pattern, i, j)]
        for sample in range(b):
            for head in range(n):
                ks, vs = k[keys, sample, head // repeat], v[keys, sample, head // repeat]
                weights = (ks @ q[i, sample, head] * pattern.scale).softmax(-1)
                if keep is not None:
                    weights = weights * keep[sample, head, i, keys]
                rows.append(weights @ vs)
    return torch.stack(rows).view(s, b, n, -1)


def _agree(
    pattern: AttentionPattern,
    groups: int,
    z: int = S,
    dropout: AttentionDropout | None = None,
    keep: Tensor | None = None,
) -> None:
    results = []
    for ours in (True, False):
        leaves = [x.requires_grad_() for x in _inputs(groups, z)]
        q, k, v = leaves
        out = attention(q, k, v, pattern, dropout) if ours else _reference(q, k, v, pattern, keep)
        weight = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).sin()
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


PATTERNS = {
    "causal": AttentionPattern(True, 0.3),
    "bidirectional": AttentionPattern(False, 1 / math.sqrt(D)),
    "window of one": AttentionPattern(True, 0.3, window=1),
    "window": AttentionPattern(True, 0.3, window=4),
    "window of all but one": AttentionPattern(True, 0.3, window=S - 1),
    "window that hides nothing": AttentionPattern(True, 0.3, window=S),
}


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name: str, groups: int) -> None:
    _agree(PATTERNS[name], groups)


@pytest.mark.parametrize("groups", [4, 1])
def test_keys_of_another_length(groups: int) -> None:
    _agree(AttentionPattern(False, 0.3), groups, z=5)


@pytest.mark.parametrize("name", PATTERNS)
def test_bf16(name: str) -> None:
    q, k, v = _inputs(2, dtype=torch.bfloat16)
    exact = _reference(q.double(), k.double(), v.double(), PATTERNS[name])
    out = attention(q, k, v, PATTERNS[name])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-7, atol=2.0**-7)


def test_visible_counts_the_token_itself() -> None:
    seen = visible(AttentionPattern(True, 1.0, window=2), torch.arange(4), 4)
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    seen = visible(AttentionPattern(True, 1.0), torch.arange(3), 3)
    assert seen.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_window_without_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="window 4 needs causal"):
        AttentionPattern(False, 1.0, window=4)


# ---- Dropout -------------------------------------------------------------------------------------


def _dropout(p: float) -> AttentionDropout:
    return AttentionDropout(p, KEY, "layer.core_attention", first_head=0, total_heads=N)


def _keep(p: float, z: int) -> Tensor:
    """The mask as defined: a hash of the element's index in `[samples, heads, s, z]`."""
    keep = torch.zeros(B, N, S, z, dtype=torch.float64)
    stream = KEY.stream("layer.core_attention")
    for sample in range(B):
        for head in range(N):
            first = (((sample + KEY.first_sample) * N + head) * S) * z
            words = philox(stream, torch.arange(first, first + S * z))[0].view(S, z)
            keep[sample, head] = (words >= p * 2**32).double() / (1 - p)
    return keep


@pytest.mark.parametrize("name", PATTERNS)
def test_dropout_by_its_definition(name: str) -> None:
    keep = _keep(0.25, S)
    assert set(keep.unique().tolist()) == {0.0, 1 / 0.75}
    _agree(PATTERNS[name], 2, dropout=_dropout(0.25), keep=keep)


def test_dropout_with_keys_of_another_length() -> None:
    _agree(AttentionPattern(False, 0.3), 2, z=5, dropout=_dropout(0.5), keep=_keep(0.5, 5))


def test_dropout_statistics() -> None:
    """With equal scores and values of one, an output is its kept weights' sum: mean 1."""
    s, b, n, p = 64, 2, 4, 0.3
    q, k = torch.zeros(s, b, n, 1).double(), torch.zeros(s, b, n, 1).double()
    out = attention(q, k, torch.ones_like(k), AttentionPattern(False, 1.0), _dropout(p))
    deviation = math.sqrt(p / (1 - p) / s)  # of the mean of s weights that are 0 or 1 / (1 - p)
    assert abs(out.mean().item() - 1) < 4 * deviation / math.sqrt(s * b * n)
    assert abs(out.std().item() / deviation - 1) < 0.15


def test_a_slice_of_heads_and_samples_draws_the_mask_of_the_whole() -> None:
    q, k, v = _inputs(2)
    whole = attention(q, k, v, PATTERNS["causal"], _dropout(0.4))
    heads = dataclasses.replace(_dropout(0.4), first_head=2)
    part = attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], PATTERNS["causal"], heads)
    torch.testing.assert_close(part, whole[:, :, 2:], rtol=1e-14, atol=1e-14)
    second = dataclasses.replace(_dropout(0.4), key=dataclasses.replace(KEY, first_sample=7))
    part = attention(q[:, 1:], k[:, 1:], v[:, 1:], PATTERNS["causal"], second)
    torch.testing.assert_close(part, whole[:, 1:], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("change", [{"step": 12}, {"seed": 4}, {"first_sample": 8}])
def test_masks_differ_by_seed_step_and_sample(change: dict[str, int]) -> None:
    q, k, v = _inputs(2)
    other = dataclasses.replace(_dropout(0.4), key=dataclasses.replace(KEY, **change))
    a = attention(q, k, v, PATTERNS["causal"], _dropout(0.4))
    b = attention(q, k, v, PATTERNS["causal"], other)
    assert not torch.allclose(a, b)


# ---- Masks by row --------------------------------------------------------------------------------

BOUNDS = torch.tensor([[0, 2, 3, 9, 9], [0, 4, 9, 9, 9]], dtype=torch.int32)


def _part(tensors: list[Tensor], a: int, b: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x[a:b, row : row + 1] for x in tensors)
    return q, k, v


def test_documents_from_their_bounds() -> None:
    documents = Documents.between(BOUNDS, S)
    assert documents.ids.tolist() == [[0, 0, 1, 2, 2, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, 1]]
    assert documents.positions.tolist() == [
        [0, 1, 0, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 0, 1, 2, 3, 4],
    ]
    one = Documents.between(torch.tensor([[0, 3]], dtype=torch.int32), 3)
    assert one.positions.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", PATTERNS)
def test_documents_are_as_if_apart(name: str, groups: int) -> None:
    results = []
    for together in (True, False):
        q, k, v = leaves = [x.requires_grad_() for x in _inputs(groups)]
        if together:
            mask = Documents.between(BOUNDS, S)
            out = attention(q, k, v, PATTERNS[name], mask=mask)
        else:
            rows = []
            for row, bounds in enumerate(BOUNDS.tolist()):
                parts = [
                    _reference(*_part(leaves, a, b, row), PATTERNS[name])
                    for a, b in itertools.pairwise(bounds)
                    if a < b
                ]
                rows.append(torch.cat(parts))
            out = torch.cat(rows, dim=1)
        weight = torch.arange(out.numel(), dtype=torch.float64).view(out.shape).sin()
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_within_documents() -> None:
    """The mask is that of the whole row: what documents hide is left out of the sum."""
    q, k, v = _inputs(2)
    out = attention(q, k, v, PATTERNS["window"], _dropout(0.25), Documents.between(BOUNDS, S))
    keep = _keep(0.25, S)
    for row, bounds in enumerate(BOUNDS.tolist()):
        for a, b in itertools.pairwise(bounds):
            if a < b:
                kept = keep[row : row + 1, :, a:b, a:b]
                part = _part([q, k, v], a, b, row)
                expected = _reference(*part, PATTERNS["window"], kept)
                torch.testing.assert_close(
                    out[a:b, row : row + 1], expected, rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", ["causal", "window", "window of one"])
def test_queries_at_given_positions(name: str, groups: int) -> None:
    q, k, v = _inputs(groups)
    whole = attention(q, k, v, PATTERNS[name])
    positions = torch.tensor([[2, 3, 8], [0, 5, 6]])
    rows = torch.arange(B)
    some = q[positions.t(), rows]
    out = attention(some, k, v, PATTERNS[name], mask=QueryPositions(positions))
    torch.testing.assert_close(out, whole[positions.t(), rows], rtol=1e-12, atol=1e-12)
