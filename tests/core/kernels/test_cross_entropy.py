import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from core.config.parallel import ParallelConfig
from core.kernels.cross_entropy import VocabSlice, vocab_parallel_cross_entropy
from core.parallel.context import ParallelContext
from core.testing.distributed import WorkerPool

TOKENS = 11
# Vocabulary and columns of each rank. With 17 tokens over 4 ranks of 8 columns the last rank has
# padding alone, and the one before it a single token.
SIZES = {1: (17, 24), 2: (13, 8), 4: (17, 8)}
POISON = 1e4


def _whole(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (the first and the last token among them), and a weight for every loss."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 5 * torch.randn(TOKENS, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (TOKENS,), generator=generator)
    labels[0], labels[1] = 0, vocab - 1
    weight = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    weight[2] = 0.0  # masked out
    return logits.to(dtype), labels, weight.to(torch.promote_types(dtype, torch.float32))


def _run(tp: int, dtype: torch.dtype, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the gradient of this rank's tokens and of its padding columns."""
    config = ParallelConfig(tp=tp)
    single = not dist.is_initialized()
    ctx = (
        ParallelContext.single() if single else ParallelContext.create(config, torch.device("cpu"))
    )
    vocab, columns = SIZES[tp]
    logits, labels, weight = _whole(vocab, dtype)
    first = ctx.tp.rank * columns
    mine = logits[:, first : first + columns]
    valid = mine.shape[1]
    padded = torch.full((TOKENS, columns), POISON, dtype=dtype)
    padded[:, :valid] = mine
    leaf = padded.clone().requires_grad_()
    part = VocabSlice(ctx.tp, first, valid, vocab)
    # The logits are overwritten by their gradient, so they must not be a leaf.
    losses = vocab_parallel_cross_entropy(leaf * 1, labels, part, smoothing)
    (losses * weight).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    return losses.detach(), leaf.grad[:, :valid], leaf.grad[:, valid:]


def _check(results: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, eps: float) -> None:
    vocab, _ = SIZES[len(results)]
    logits, labels, weight = _whole(vocab, dtype)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none", label_smoothing=eps)
    (expected * weight).sum().backward()
    assert exact.grad is not None
    tol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for losses, _, padding in results:
        assert losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(losses, results[0][0])
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=tol, atol=tol)
        assert torch.equal(padding, torch.zeros_like(padding))
    grad = torch.cat([grad for _, grad, _ in results], dim=1)
    tol = 2.0**-8 if dtype == torch.bfloat16 else tol  # the gradient is rounded to bf16 at the end
    torch.testing.assert_close(grad.double(), exact.grad, rtol=tol, atol=tol / 100)


def _run_all(tp: int) -> dict[tuple[torch.dtype, float], tuple[Tensor, Tensor, Tensor]]:
    return {
        (dtype, eps): _run(tp, dtype, eps)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for eps in (0.0, 0.1)
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_is_torchs_at_every_layout(pool: WorkerPool, tp: int) -> None:
    ranks = [_run_all(1)] if tp == 1 else pool.run(_run_all, tp, tp)
    if tp == 4:
        assert ranks[3][torch.float64, 0.0][1].shape == (TOKENS, 0)
    for dtype, eps in ranks[0]:
        _check([rank[dtype, eps] for rank in ranks], dtype, eps)


def _one_token() -> float:
    ctx = ParallelContext.create(ParallelConfig(tp=2), torch.device("cpu"))
    logits, labels, _ = _whole(16, torch.float64)
    first = 8 * ctx.tp.rank
    part = VocabSlice(ctx.tp, first, 8, 16)
    mine = logits[:1, first : first + 8].clone()
    return vocab_parallel_cross_entropy(mine, labels[:1], part, 0.1).item()


def test_one_token(pool: WorkerPool) -> None:
    """A column of one row is contiguous as it is, so that a sum in place could reach the rest."""
    logits, labels, _ = _whole(16, torch.float64)
    expected = F.cross_entropy(logits[:1], labels[:1], label_smoothing=0.1).item()
    assert pool.run(_one_token, 2) == [pytest.approx(expected, rel=1e-12)] * 2


def _slice(columns: int) -> VocabSlice:
    return VocabSlice(ParallelContext.single().tp, 0, columns, columns)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[9e4, 0.0, -9e4], [-9e4, -9e4, -9e4]], requires_grad=True)
    losses = vocab_parallel_cross_entropy(logits * 1, torch.tensor([1, 2]), _slice(3))
    torch.testing.assert_close(losses, torch.tensor([9e4, math.log(3)]))
    losses.sum().backward()
    assert logits.grad is not None
    third = torch.tensor([1.0, 1.0, 1.0]) / 3
    expected = torch.stack((torch.tensor([1.0, -1.0, 0.0]), third - torch.tensor([0.0, 0.0, 1.0])))
    torch.testing.assert_close(logits.grad, expected)


def test_second_backward_is_refused() -> None:
    """The first one has overwritten the logits; autograd must notice and not give wrong numbers."""
    leaf = torch.randn(3, 5, requires_grad=True)
    loss = vocab_parallel_cross_entropy(leaf * 1, torch.tensor([1, 2, 3]), _slice(5)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_takes_no_memory_of_its_own() -> None:
    leaf = torch.randn(3, 5, requires_grad=True)
    logits = leaf * 1
    seen: list[int] = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    vocab_parallel_cross_entropy(logits, torch.tensor([1, 2, 3]), _slice(5)).sum().backward()
    assert seen == [logits.data_ptr()]
