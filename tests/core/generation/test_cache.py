"""Reading a text in parts gives the logits of reading it whole, in fp64."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config.parallel import ParallelConfig
from core.config.transformer import RopeConfig, TransformerConfig
from core.generation.cache import KeyValueCache
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.layouts import randomize
from core.transformer.decoder import build_decoder
from core.transformer.language_model import LanguageModel

CPU = torch.device("cpu")
BASE = TransformerConfig(
    num_layers=3,
    hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=20,
    vocab_size=67,
    max_position_embeddings=64,
)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 4, "sliding_window_layers": (0, 2)},
    "window of one": {"sliding_window": 1},
    "query norm, biases": {"qk_norm": "rmsnorm", "qkv_bias": True, "tie_embeddings": True},
    "partial rotary": {"rope": RopeConfig(partial_factor=0.5)},
    "no positions": {"position_embedding": "none"},
    "one key head": {"num_query_groups": 1},
}
LENGTHS = (3, 7, 5)
TEXT = 12


def _model(name: str, ctx: ParallelContext) -> LanguageModel:
    config = dataclasses.replace(BASE, **MODELS[name])
    model = build_decoder(config, Placement(ctx, torch.float64, CPU)).eval()
    randomize(declared_parameters(model))
    return model


def _text() -> Tensor:
    return torch.randint(67, (len(LENGTHS), TEXT), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def _compare(name: str, ctx: ParallelContext, chunk: int) -> float:
    """Largest difference between logits in parts and those of the whole text, at every place."""
    model, text = _model(name, ctx), _text()
    whole = model.logits(text)
    rows, lengths = torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)
    prompt = text[:, : max(LENGTHS)].clone()
    prompt[torch.arange(max(LENGTHS)) >= lengths[:, None]] = 66  # padding, which no one may see
    cache = KeyValueCache(TEXT)
    cache.begin(max(LENGTHS))
    found = model.next_logits(prompt, cache, lengths - 1)
    worst = (found - whole[rows, lengths - 1]).abs().max()
    for step in range(0, TEXT - max(LENGTHS) - chunk + 1, chunk):
        positions = lengths[:, None] + step + torch.arange(chunk)
        cache.begin(max(LENGTHS) + step + chunk, positions)
        for place in range(chunk):  # reading again what has been read changes nothing
            last = torch.full_like(lengths, place)
            found = model.next_logits(text[rows[:, None], positions], cache, last)
            worst = torch.maximum(worst, (found - whole[rows, positions[:, place]]).abs().max())
    return float(worst / whole.abs().max())


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_in_parts(name: str, chunk: int) -> None:
    assert _compare(name, ParallelContext.single(), chunk) < 1e-12


def _on_rank(tp: int) -> list[float]:
    ctx = ParallelContext.create(ParallelConfig(tp=tp), CPU)
    return [_compare(name, ctx, 1) for name in MODELS]


@pytest.mark.parametrize("tp", [2, 4])
def test_a_text_in_parts_over_ranks(pool: WorkerPool, tp: int) -> None:
    assert all(max(found) < 1e-12 for found in pool.run(_on_rank, tp, tp))


def test_no_state_stays_in_the_model() -> None:
    model, text = _model("plain", ParallelContext.single()), _text()
    before = {name: id(value) for name, value in model.named_modules()}
    with torch.no_grad():
        whole = model.logits(text)
        cache = KeyValueCache(TEXT)
        cache.begin(TEXT)
        model.next_logits(text, cache, torch.zeros(3, dtype=torch.int64))
        assert torch.equal(model.logits(text), whole)
    assert before == {name: id(value) for name, value in model.named_modules()}
    assert model(text, text).requires_grad


def test_a_full_cache_is_said() -> None:
    with pytest.raises(ValueError, match="9 tokens do not fit in a cache of 8"):
        KeyValueCache(8).begin(9)
