"""Compiled and hand-written kernels against the plain ones on the CPU, the number of graphs they
need, and which attention runs."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from core.data_parallel.main_grad import accumulate_product, expire
from core.kernels.attention import attention
from core.kernels.attention_pattern import AttentionDropout, AttentionPattern, visible
from core.kernels.chosen_attention import chosen_kernel
from core.kernels.cross_entropy import VocabSlice, vocab_parallel_cross_entropy
from core.kernels.elementwise import (
    Activation,
    _Activation,
    _AddNorm,
    _Rotary,
    add_norm,
    drop,
    layer_norm,
    mlp_activation,
    plain_rms_norm,
    rms_norm,
    rotary,
)
from core.kernels.masked_attention import Documents, QueryPositions
from core.kernels.reduction import sum_of_squares
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
    ("swiglu", mlp_activation, [_random(100, 512), _random(512)], ("silu", True)),
    *(
        (f"gated {kind}", mlp_activation, [_random(100, 2 * 1500)], (None, kind, True))
        for kind in get_args(Activation)
    ),
    (
        "sum and norm",
        lambda x, branch, weight: add_norm(x, branch, None, weight, None, 1e-5),
        [_random(500, 2, 1500), _random(500, 1, 3000).view(500, 2, 1500), _random(1500)],
        (),
    ),
    (
        "fork and norm",
        lambda x, weight: add_norm(x, None, None, weight, None, 1e-5),
        [_random(5, 2, 4096), _random(4096)],
        (),
    ),
    (
        "sum and layer norm",
        add_norm,
        [_random(500, 2, 1600), _random(2, 500, 1600).view(500, 2, 1600)]
        + [_random(1600, scale=scale) for scale in (1.0, 2.0, 0.5)],
        (1e-5,),
    ),
    (
        "norm of heads",
        lambda qkv, weight: rms_norm(qkv[:, :, 2:7], weight, 1e-5),
        [_random(300, 2, 9, 128), _random(128)],
        (),
    ),
    (
        "layer norm of heads",
        lambda qkv, weight, bias: layer_norm(qkv[:, :, :6], weight, bias, 1e-5),
        [_random(300, 2, 9, 80), _random(80), _random(80, scale=0.5)],
        (),
    ),
    ("gelu", mlp_activation, [_random(1000, 1500), _random(1500)], ("gelu_tanh", False)),
    (
        "rotary",
        rotary,
        [_random(64, 2, 4, 32), _random(64, 2, 2, 32)],
        (torch.rand(64, 16).cos(), torch.rand(64, 16).sin()),
    ),
    (
        "rotary of a fused projection",
        lambda qkv, cos, sin: rotary(qkv[:, :, :32], qkv[:, :, 32:40], cos, sin),
        [_random(64, 2, 48, 128)],
        (torch.rand(64, 128).cos(), torch.rand(64, 128).sin()),
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
    (
        "cross_entropy of a large vocabulary",
        vocab_parallel_cross_entropy,
        [_random(20, 5008, scale=5.0)],
        (torch.arange(20) * 250, VocabSlice(ONE, 0, 5001, 5001)),
    ),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_compiled_equals_plain(case: Any, dtype: torch.dtype, tolerance: float) -> None:
    _, fn, tensors, rest = case
    _close(_both(fn, tensors, rest, dtype), tolerance)


def test_hand_written_kernels_are_used() -> None:
    x, weight = (torch.ones(4, 8, device="cuda", requires_grad=True) for _ in range(2))
    for gated in (True, False):
        assert type(mlp_activation(x, None, "silu", gated).grad_fn) is _Activation._backward_cls
    for bias in (None, weight[1]):
        normed = add_norm(x, x, bias, weight[0], bias, 1e-5)[1]
        assert type(normed.grad_fn) is _AddNorm._backward_cls
    heads = x[:, None, None]
    assert type(rotary(heads, heads, x, x)[1].grad_fn) is _Rotary._backward_cls
    for alone in (rms_norm(x, weight[0], 1e-5), layer_norm(x, weight[0], weight[1], 1e-5)):
        assert type(alone.grad_fn) is _AddNorm._backward_cls


def test_sum_of_squares_is_exact_and_repeats_itself() -> None:
    parts = [_random(n).cuda() for n in (1, 16_385, 1_000_003)]
    parts.append(_random(300, 200).cuda()[:, 3:100])
    found = sum_of_squares(parts)
    expected = sum(part.double().square().sum() for part in parts)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert all(torch.equal(sum_of_squares(parts), found) for _ in range(3))


def test_a_norms_gradient_is_exact_after_other_numbers_of_tokens() -> None:
    """However the sum over tokens is cut, it must not be for the first number seen."""
    for tokens in (1, 7, 300, 20_000):
        x, weight, bias = _random(tokens, 1, 256), _random(256), _random(256)
        _close(_both(layer_norm, [x, weight, bias], (1e-5,), torch.float32), 1e-5)


def test_a_norms_weight_gradient_repeats_itself() -> None:
    x, weight = _random(2000, 1, 512).cuda(), _random(512).cuda().requires_grad_()

    def run() -> Tensor:
        total, normed = add_norm(x, x, None, weight, None, 1e-5)
        return torch.autograd.grad((total * normed).sum(), weight)[0]

    first = run()
    assert all(torch.equal(run(), first) for _ in range(3))


def test_a_new_number_of_tokens_needs_no_new_graph() -> None:
    torch._dynamo.reset()
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    graphs = []
    for tokens in (64, 96, 128, 1000, 4096):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        plain_rms_norm(mlp_activation(x, None, "silu", True), weight, 1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * len(graphs)


def test_a_product_overwrites_a_stale_gradient() -> None:
    """In the GEMM that writes fp32 from 16-bit inputs."""
    weight: Any = torch.nn.Parameter(torch.zeros(64, 32, device="cuda", dtype=torch.bfloat16))
    weight.main_grad, weight.grad_ready = torch.zeros(64, 32, device="cuda"), lambda: None
    dy, x = (_random(100, n).cuda().bfloat16() for n in (64, 32))
    for factor in (1, 2):
        accumulate_product(weight, dy, x)
        expected = factor * (dy.float().t() @ x.float())
        torch.testing.assert_close(weight.main_grad, expected, rtol=1e-3, atol=1e-3)
    expire(weight)
    weight.main_grad.fill_(torch.nan)
    accumulate_product(weight, dy, x)
    torch.testing.assert_close(weight.main_grad, expected / 2, rtol=1e-3, atol=1e-3)


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
