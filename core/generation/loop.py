"""Tokens after prompts, one by one, by any model that can say what comes next.

Legend: b prompts, s tokens of the longest prompt.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from core.config.generation import GenerationConfig
from core.errors import ConfigError
from core.generation.cache import KeyValueCache
from core.generation.sampling import next_tokens
from core.parallel.context import Axis


@runtime_checkable
class GenerativeModel(Protocol):
    """A model that text can be generated with."""

    @property
    def config(self) -> Any:
        """The architecture; its `max_position_embeddings` limits a text's length."""

    def next_logits(self, tokens: Tensor, cache: KeyValueCache, last: Tensor) -> Tensor:
        """Logits of what follows token `last` (int64 `[b]`, a place in `tokens`) of every row,
        `[b, vocab]`, the same on every rank.
        """


def check_lengths(prompts: Sequence[Sequence[int]], max_tokens: int, positions: int) -> None:
    """Check that prompts and answers fit in a model.

    Raises:
        ConfigError: there is no prompt, one is empty, or one is too long.
    """
    if not prompts:
        raise ConfigError("there is nothing to go on from: give a --prompt")
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ConfigError(f"prompt {number} has no token: give it some text")
        if len(prompt) + max_tokens > positions:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens, and {max_tokens} more (--max-tokens) "
                f"pass the model's {positions} positions: shorten the prompt, or lower --max-tokens"
            )


def generate(
    model: GenerativeModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    tp: Axis,
    device: torch.device,
    ends: Collection[int] = (),
) -> Iterator[list[int | None]]:
    """Generate until every row has met an end or is full.

    Collective over `tp`; every rank gets the same tokens. The prompts are read in one pass, padded
    to the longest, and every pass after it reads one token a row.

    Args:
        model: in evaluation mode.
        prompts: tokens, of any lengths.
        config: how tokens are chosen.
        tp: the axis over which the model is cut.
        device: where it is.
        ends: tokens after which a row is over.

    Yields:
        The next token of every row, an end included; None for rows that are over.

    Raises:
        ConfigError: see `check_lengths`.
    """
    check_lengths(prompts, config.max_tokens, model.config.max_position_embeddings)
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    cache = KeyValueCache(longest + config.max_tokens)
    cache.begin(longest)
    read = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=device)
    last = positions = torch.tensor(lengths, device=device) - 1
    running = [True] * len(prompts)
    for step in range(config.max_tokens):
        chosen = _choose(model, read, cache, last, (config, step, tp))
        tokens = chosen.tolist()
        yield [token if runs else None for token, runs in zip(tokens, running, strict=True)]
        running = [runs and token not in ends for token, runs in zip(tokens, running, strict=True)]
        if not any(running):
            return
        # Rows that are over go on with the others, in slots of their own; no one looks at them.
        read, last, positions = chosen[:, None], torch.zeros_like(last), positions + 1
        cache.begin(longest + step + 1, positions[:, None])


# Not around the loop: a generator would leave its caller without gradients between tokens.
@torch.no_grad()
def _choose(
    model: GenerativeModel,
    read: Tensor,
    cache: KeyValueCache,
    last: Tensor,
    how: tuple[GenerationConfig, int, Axis],
) -> Tensor:
    config, step, tp = how
    chosen = next_tokens(model.next_logits(read, cache, last), config, step)
    if tp.group is not None:
        # The same numbers everywhere already; were they not, ranks would part for good.
        dist.broadcast(chosen, src=tp.ranks[0], group=tp.group)
    return chosen
