"""Compiled kernels against the plain ones on the CPU, the number of graphs they need, and which
attention runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from core.kernels.attention import (
    AttentionDropout,
    AttentionPattern,
    Documents,
    QueryPositions,
    attention,
    chosen_kernel,
    visible,
)
from core.kernels.cross_entropy import VocabSlice, vocab_parallel_cross_entropy
from core.kernels.elementwise import (
    biased_activation,
    drop,
    gated_activation,
    layer_norm,
    rms_norm,
    rotary,
)
from core.parallel.context import Axis
from core.parallel.random import DropoutKey, key_words

pytestmark = pytest.mark.gpu

ONE = Axis("tp", 1, 0, (0,), None)


def _random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def _both(
    fn: Callable[..., Any], tensors: list[Tensor], rest: tuple[Any, ...], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients on the GPU in `dtype`, and on the CPU in fp64 from the same rounded
    inputs."""
    found = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        inputs = [x.to(dtype).to(device, kind).requires_grad_() for x in tensors]
        out = fn(*inputs, *(x.to(device) if isinstance(x, Tensor) else x for x in rest))
        outs = [out] if isinstance(out, Tensor) else list(out)
        weights = [_random(*y.shape).to(device) for y in outs]
        total = torch.stack([(y.double() * w).sum() for y, w in zip(outs, weights, strict=True)])
        grads = torch.autograd.grad(total.sum(), inputs)
        found.append([x.detach().cpu().double() for x in (*outs, *grads)])
    return found[0], found[1]


def _close(pairs: tuple[list[Tensor], list[Tensor]], tolerance: float) -> None:
    for actual, expected in zip(*pairs, strict=True):
        error = (actual - expected).norm() / expected.norm()
        assert error < tolerance, f"{error:.2e}"


CASES: list[tuple[str, Callable[..., Any], list[Tensor], tuple[Any, ...]]] = [
    ("rms_norm", rms_norm, [_random(100, 2, 256), _random(256)], (1e-5,)),
    (
        "layer_norm",
        layer_norm,
        [_random(100, 2, 256), _random(256), _random(256, scale=0.5)],
        (1e-5,),
    ),
    ("swiglu", gated_activation, [_random(100, 512), _random(512)], ("silu",)),
    ("gelu", biased_activation, [_random(100, 512), _random(512)], ("gelu_tanh",)),
    (
        "rotary",
        rotary,
        [_random(64, 2, 4, 32), _random(64, 2, 2, 32)],
        (torch.rand(64, 16).cos(), torch.rand(64, 16).sin()),
    ),
    (
        "rotary by row",
        rotary,
        [_random(64, 2, 4, 32), _random(64, 2, 2, 32)],
        (torch.rand(64, 2, 16).cos(), torch.rand(64, 2, 16).sin()),
    ),
    (
        "cross_entropy",
        vocab_parallel_cross_entropy,
        [_random(100, 136)],
        (torch.arange(100) % 131, VocabSlice(ONE, 0, 131, 131), 0.1),
    ),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_compiled_equals_plain(case: Any, dtype: torch.dtype, tolerance: float) -> None:
    _, fn, tensors, rest = case
    _close(_both(fn, tensors, rest, dtype), tolerance)


def test_a_new_number_of_tokens_needs_no_new_graph() -> None:
    torch._dynamo.reset()
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    graphs = []
    for tokens in (64, 96, 128, 1000, 4096):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        rms_norm(gated_activation(x, None, "silu"), weight, 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * len(graphs)


def test_dropout_mask_is_that_of_the_cpu() -> None:
    rows = torch.arange(300)
    x = torch.ones(300, 64)
    masks = [
        drop(x.to(d), rows.to(d), *key_words(0x123456789ABCDEF0, torch.device(d)), 0.3).cpu()
        for d in ("cpu", "cuda")
    ]
    torch.testing.assert_close(masks[0], masks[1])


def _attention_reference(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * pattern.scale
    if pattern.causal:
        mask = visible(pattern, torch.arange(q.shape[2], device=q.device), k.shape[2])
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v).permute(2, 0, 1, 3)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(causal: bool, window: int | None) -> None:
    if window is not None and not causal:
        pytest.skip("windows are causal")
    pattern = AttentionPattern(causal, 0.1, window)
    tensors = [_random(256, 2, 8, 64), _random(256, 2, 2, 64), _random(256, 2, 2, 64)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, pattern) if q.is_cuda else _attention_reference(q, k, v, pattern)

    _close(_both(run, tensors, (), torch.bfloat16), 2e-2)


@pytest.mark.parametrize("window", [None, 100])
def test_documents(window: int | None) -> None:
    """Row by row other bounds, and new bounds without a new graph; the CPU's is the plain one."""
    pattern = AttentionPattern(True, 0.1, window)
    tensors = [_random(256, 2, 8, 64), _random(256, 2, 2, 64), _random(256, 2, 2, 64)]
    graphs = []
    for bounds in ([[0, 100, 130, 256], [0, 7, 256, 256]], [[0, 1, 2, 256], [0, 256, 256, 256]]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)

        def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor = cu_seqlens) -> Tensor:
            documents = Documents.between(cu_seqlens.to(q.device), 256)
            return attention(q, k, v, pattern, mask=documents)

        _close(_both(run, tensors, (), torch.bfloat16), 2e-2)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]


def test_documents_never_wait_for_the_device() -> None:
    shapes = [(256, 2, 8, 64), (256, 2, 2, 64), (256, 2, 2, 64)]
    q, k, v = (_random(*shape).cuda().bfloat16().requires_grad_() for shape in shapes)
    bounds = torch.tensor([[0, 100, 130, 256], [0, 7, 256, 256]], dtype=torch.int32).pin_memory()
    try:
        for step in range(4):
            if step == 2:  # what is compiled has been by then
                torch.cuda.set_sync_debug_mode("error")
            documents = Documents.between(bounds.to("cuda", non_blocking=True), 256)
            attention(q, k, v, AttentionPattern(True, 0.1), mask=documents).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_queries_at_given_positions() -> None:
    pattern = AttentionPattern(True, 0.1, 100)
    tensors = [_random(1, 2, 8, 64), _random(256, 2, 2, 64), _random(256, 2, 2, 64)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = QueryPositions(torch.tensor([[255], [20]], device=q.device))
        return attention(q, k, v, pattern, mask=mask)

    _close(_both(run, tensors, (), torch.bfloat16), 2e-2)


@pytest.mark.parametrize(("heads", "groups", "size"), [(32, 8, 128), (8, 2, 128), (16, 16, 64)])
def test_cudnn_attention_is_chosen(heads: int, groups: int, size: int) -> None:
    assert chosen_kernel((2048, 1, heads, size), groups, torch.bfloat16) == "CUDNN_ATTENTION"


def test_attention_dropout_repeats_itself_and_differs_by_step() -> None:
    q, k, v = (torch.randn(128, 2, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))

    def run(step: int) -> Tensor:
        dropout = AttentionDropout(0.5, DropoutKey(1, step, 0), "layer", 0, 4)
        return attention(q, k, v, AttentionPattern(True, 0.125), dropout)

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
