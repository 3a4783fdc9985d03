from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config.generation import GenerationConfig
from core.errors import ConfigError
from core.generation.cache import KeyValueCache
from core.generation.loop import GenerativeModel, check_lengths, generate
from core.parallel.context import ParallelContext

CTX = ParallelContext.single()


class Counting:
    """Says that the token after t is t + 1, and notes what it is asked."""

    def __init__(self) -> None:
        self.config: Any = SimpleNamespace(max_position_embeddings=20)
        self.positions: list[Tensor | None] = []

    def next_logits(self, tokens: Tensor, cache: KeyValueCache, last: Tensor) -> Tensor:
        self.positions.append(cache.positions)
        now = tokens[torch.arange(len(tokens)), last]
        return torch.nn.functional.one_hot((now + 1) % 30, 30).double()


def _run(
    prompts: Sequence[Sequence[int]], ends: Sequence[int] = (), max_tokens: int = 4
) -> tuple[list[list[int | None]], Counting]:
    model = Counting()
    config = GenerationConfig(max_tokens=max_tokens)
    steps = generate(model, prompts, config, tp=CTX.tp, device=CTX.device, ends=ends)
    return list(steps), model


def test_rows_of_different_lengths() -> None:
    assert isinstance(Counting(), GenerativeModel)
    steps, model = _run([[1, 2, 3], [7]])
    assert steps == [[4, 8], [5, 9], [6, 10], [7, 11]]
    assert model.positions[0] is None
    assert [p.tolist() for p in model.positions[1:] if p is not None] == [
        [[3], [1]],
        [[4], [2]],
        [[5], [3]],
    ]


def test_a_row_is_over_at_an_end_and_the_others_go_on() -> None:
    assert _run([[1], [7], [20]], ends=[9, 3])[0] == [
        [2, 8, 21],
        [3, 9, 22],
        [None, None, 23],
        [None, None, 24],
    ]
    steps, model = _run([[1], [2]], ends=[3])
    assert steps == [[2, 3], [3, None]]
    assert len(model.positions) == 2  # nothing is computed once all are over


def test_gradients_stay_on_for_the_caller() -> None:
    model = Counting()
    steps = generate(model, [[1]], GenerationConfig(), tp=CTX.tp, device=CTX.device)
    with pytest.raises(ConfigError, match="128 more"):
        next(steps)
    steps = generate(model, [[1]], GenerationConfig(max_tokens=3), tp=CTX.tp, device=CTX.device)
    next(steps)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "nothing to go on from"),
        ([[1], []], "prompt 2 has no token"),
        ([[1], [1] * 17], r"prompt 2 has 17 tokens, and 4 more .* the model's 20 positions"),
    ],
)
def test_prompts_that_cannot_be(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run(prompts)
    check_lengths([[1] * 16], 4, 20)
