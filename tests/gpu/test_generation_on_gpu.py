"""A GPU generates what a CPU does."""

from typing import Any

import pytest
import torch

from core.config.generation import GenerationConfig
from core.config.transformer import TransformerConfig
from core.generation.loop import generate
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import Init
from core.parallel.sharding import declared_parameters
from core.testing.layouts import randomize
from core.transformer.decoder import build_decoder

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 9, 30], [60, 3, 7, 11, 2, 40, 41, 42, 43], [8]]


def _tokens(device: str, config: GenerationConfig, **changes: Any) -> list[list[int | None]]:
    ctx = ParallelContext.single(device)
    architecture = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=32,
        ffn_hidden_size=96,
        vocab_size=67,
        max_position_embeddings=64,
        **changes,
    )
    model = build_decoder(architecture, Placement(ctx, torch.float32, ctx.device)).eval()
    randomize(declared_parameters(model), init=Init("normal", 0.4))
    return list(generate(model, PROMPTS, config, tp=ctx.tp, device=ctx.device))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"qk_norm": "rmsnorm"}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_a_cpu(changes: dict[str, Any], temperature: float) -> None:
    config = GenerationConfig(max_tokens=20, temperature=temperature)
    tokens = _tokens("cuda", config, **changes)
    assert tokens == _tokens("cpu", config, **changes)
    assert len({token for row in tokens for token in row}) > 5
