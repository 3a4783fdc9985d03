import math

import pytest
import torch

from core.config.generation import GenerationConfig
from core.generation.sampling import keep_top_k, keep_top_p, next_tokens

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0, 1.5], [3.0, 0.0, 0.0, 0.0, 0.0]])


def _kept(scores: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in scores]


def test_greedy() -> None:
    assert next_tokens(LOGITS, GenerationConfig(), 0).tolist() == [1, 0]


def test_top_k() -> None:
    assert _kept(keep_top_k(LOGITS, 2)) == [[1, 4], [0, 1, 2, 3, 4]]  # all after the first tie
    assert _kept(keep_top_k(LOGITS, 9)) == [[0, 1, 2, 3, 4]] * 2


def test_top_p() -> None:
    probability = LOGITS[0].softmax(-1)
    two = float(probability[1] + probability[4])
    assert _kept(keep_top_p(LOGITS, two - 1e-4))[0] == [1, 4]
    assert _kept(keep_top_p(LOGITS, two + 1e-4))[0] == [1, 2, 4]
    assert _kept(keep_top_p(LOGITS, 1e-9)) == [[1], [0]]


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_draws_follow_the_probabilities(temperature: float) -> None:
    config = GenerationConfig(temperature=temperature, seed=5)
    rows, draws = 500, 20
    logits = LOGITS[:1].expand(rows, -1)
    counts = torch.zeros(5)
    for step in range(draws):
        counts += torch.bincount(next_tokens(logits, config, step), minlength=5)
    expected = (LOGITS[0] / temperature).softmax(-1)
    deviation = (expected * (1 - expected) / (rows * draws)).sqrt()
    assert ((counts / (rows * draws) - expected).abs() < 4 * deviation).all()


def test_a_draw_depends_on_seed_step_and_row_alone() -> None:
    config = GenerationConfig(temperature=1.0)
    logits = torch.zeros(40, 50)
    first = next_tokens(logits, config, 3)
    assert torch.equal(first, next_tokens(logits.double(), config, 3))
    assert torch.equal(first[:7], next_tokens(logits[:7], config, 3))
    for other in (
        next_tokens(logits, config, 4),
        next_tokens(logits, GenerationConfig(temperature=1.0, seed=2), 3),
        first.roll(1),
    ):
        assert (first == other).double().mean() < 0.2


def test_filters_and_draws_together() -> None:
    config = GenerationConfig(temperature=1.0, top_k=3, top_p=0.6)
    kept = keep_top_p(keep_top_k(LOGITS[:1], 3), 0.6)
    seen = {int(next_tokens(LOGITS[:1], config, step)) for step in range(200)}
    assert seen == set(_kept(kept)[0]) == {1, 4}
    assert math.isclose(float(kept[0, 1]), 2.0)
