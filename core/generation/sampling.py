"""The next token, from logits. Legend: b rows, v vocabulary."""

import torch
from torch import Tensor

from core.config.generation import GenerationConfig
from core.kernels.compile import upcast
from core.parallel.random import make_key, philox


def next_tokens(logits: Tensor, config: GenerationConfig, step: int) -> Tensor:
    """Choose a token for every row: the most likely one, or one drawn.

    A draw takes the largest of logits plus Gumbel noise, which is a draw by their probabilities
    (Maddison et al., "A* sampling", 2014). The noise is a hash of (seed, step, row, token), so it
    is the same on every rank and at every layout, and rounding of the logits, which differs between
    layouts, hardly ever changes the choice.

    Args:
        logits: `[b, v]`.
        config: how to choose.
        step: number of the token within its answer.

    Returns:
        int64 `[b]`.
    """
    if config.temperature == 0.0:
        return logits.argmax(-1)
    scores = upcast(logits) / config.temperature
    if config.top_k:
        scores = keep_top_k(scores, config.top_k)
    if config.top_p < 1.0:
        scores = keep_top_p(scores, config.top_p)
    return (scores.double() + _gumbel(config.seed, step, scores)).argmax(-1)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """The k largest scores of every row, and those that equal the last of them; -inf elsewhere."""
    least = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < least, float("-inf"))


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """As few of the most likely tokens as have probability `p` together; -inf elsewhere."""
    ordered, order = scores.sort(descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    dropped = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before >= p)
    return scores.masked_fill(dropped, float("-inf"))


def _gumbel(seed: int, step: int, like: Tensor) -> Tensor:
    rows, size = like.shape
    index = torch.arange(rows * size, device=like.device).view(rows, size)
    uniform = (philox(make_key(seed, "generation", step), index)[0].double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))
