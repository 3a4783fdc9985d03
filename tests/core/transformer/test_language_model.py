import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config.parallel import ParallelConfig, RecomputeConfig
from core.config.transformer import RopeConfig, TransformerConfig
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import DropoutKey
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.layouts import LayerCase, randomize, run_case
from core.testing.parity import assert_close
from core.transformer.language_model import LanguageModel
from models.llama.model import build_llama

CPU = torch.device("cpu")
B, S, VOCAB = 3, 8, 67
KEY = DropoutKey(seed=5, step=2, first_sample=9)
LAYOUTS = [(2, False), (2, True), (4, False), (4, True)]
DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.3}
GPT = {"normalization": "layernorm", "gated_mlp": False, "activation": "gelu", "mlp_bias": True}
FULL = RecomputeConfig(granularity="full", num_layers=2)
SELECTIVE = RecomputeConfig(granularity="selective", modules=("core_attention", "mlp", "norm"))
CASES: dict[str, tuple[dict[str, Any], RecomputeConfig | None]] = {
    "plain": ({}, None),
    "tied": ({"tie_embeddings": True, "qk_norm": "rmsnorm"}, None),
    "dropout": ({**DROPOUT, "qkv_bias": True, "mlp_bias": True}, None),
    "dropout, full recompute": (DROPOUT, FULL),
    "learned positions, tied, dropout": (
        {**DROPOUT, "position_embedding": "learned", "max_position_embeddings": S, **GPT},
        None,
    ),
    "parallel residual, dropout, selective recompute": (
        {**DROPOUT, "parallel_residual": True, "rope": RopeConfig(partial_factor=0.5), **GPT},
        SELECTIVE,
    ),
    "tied, dropout, selective recompute": ({**DROPOUT, "tie_embeddings": True}, SELECTIVE),
}


def _config(**changes: Any) -> TransformerConfig:
    base = TransformerConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=20,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    return dataclasses.replace(base, **changes)


def _place(ctx: ParallelContext | None = None, dtype: torch.dtype = torch.float64) -> Placement:
    return Placement(ctx or ParallelContext.single(), dtype, CPU)


def _tokens() -> tuple[Tensor, Tensor]:
    both = torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(1))
    both[0, :3] = torch.tensor([0, VOCAB - 1, 40])
    return both[:, :-1], both[:, 1:]


def _run_all(ctx: ParallelContext) -> dict[str, dict[str, Tensor]]:
    tokens, labels = _tokens()
    results = {}
    for name, (changes, recompute) in CASES.items():
        model = build_llama(_config(**changes), _place(ctx), recompute)
        key = KEY if "dropout" in name else None

        def losses(model: LanguageModel = model, key: DropoutKey | None = key) -> Tensor:
            out: Tensor = model(tokens, labels, key)
            return out

        results[name] = run_case(LayerCase(model, losses, output="alike"), ctx)
        with torch.no_grad():
            results[name]["logits"] = model.logits(tokens)
    return results


def _run_rank(tp: int, sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    config = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    return _run_all(ParallelContext.create(config, CPU))


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Tensor]]:
    return _run_all(ParallelContext.single())


@pytest.mark.parametrize(("tp", "sequence_parallel"), LAYOUTS)
def test_layout_computes_what_one_process_does(
    pool: WorkerPool, single: dict[str, dict[str, Tensor]], tp: int, sequence_parallel: bool
) -> None:
    for actual in pool.run(_run_rank, tp, tp, sequence_parallel):
        for name, tensors in single.items():
            assert tensors["logits"].shape == (B, S, VOCAB)
            assert actual[name].keys() == tensors.keys()
            for what, values in tensors.items():
                assert_close(actual[name][what], values, 1e-9, f"{name}: {what}")
                assert values.abs().max().item() > 1e-6, what


def test_recompute_changes_nothing() -> None:
    tokens, labels = _tokens()
    grads = []
    for recompute in (None, FULL, SELECTIVE):
        model = build_llama(_config(**DROPOUT), _place(dtype=torch.float32), recompute)
        randomize(declared_parameters(model))
        loss = model(tokens, labels, KEY).mean()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == 1 + len(list(model.parameters()))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_losses_are_those_of_the_logits() -> None:
    model = build_llama(_config(), _place())
    randomize(declared_parameters(model))
    tokens, labels = _tokens()
    losses = model(tokens, labels)
    expected = F.cross_entropy(model.logits(tokens).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_a_token_sees_those_before_it_alone() -> None:
    model = build_llama(_config(), _place())
    randomize(declared_parameters(model))
    tokens, _ = _tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    difference = (model.logits(tokens) - model.logits(changed)).abs().amax(-1)
    assert difference[:, :5].max().item() == 0.0
    assert difference[:, 5:].min().item() > 0.0


def test_starts_near_the_entropy_of_a_uniform_guess() -> None:
    model = build_llama(_config(), _place())
    initialize_parameters(declared_parameters(model), seed=0)
    assert abs(model(*_tokens()).mean().item() - torch.tensor(float(VOCAB)).log().item()) < 0.05


def test_without_positions_order_is_known_from_the_mask_alone() -> None:
    model = build_llama(_config(position_embedding="none", num_layers=1), _place())
    randomize(declared_parameters(model))
    assert model.rotary is None
    tokens, _ = _tokens()
    swapped = tokens[:, [1, 0, *range(2, S)]]
    last = model.logits(tokens)[:, -1], model.logits(swapped)[:, -1]
    torch.testing.assert_close(*last, rtol=1e-10, atol=1e-10)


def test_learned_positions_are_added_before_dropout() -> None:
    config = _config(position_embedding="learned", hidden_dropout=0.5)
    model = build_llama(config, _place())
    randomize(declared_parameters(model))
    assert model.rotary is None
    embedding, (tokens, _) = model.embedding, _tokens()
    assert embedding is not None
    assert embedding.position_embeddings is not None
    table = embedding.position_embeddings.weight
    added = embedding.word_embeddings(tokens) + table[:S, None]
    assert torch.equal(embedding(tokens, None), added)
    dropped = embedding(tokens, KEY)
    kept = dropped != 0
    assert 0.3 < kept.double().mean().item() < 0.7
    torch.testing.assert_close(dropped[kept], added[kept] / 0.5)
    # A row of its own for every position, and none for those beyond the sequence.
    model(*_tokens()).sum().backward()
    assert table.grad is not None
    assert table.grad[:S].abs().amax(1).min().item() > 0.0
    assert table.grad[S:].abs().max().item() == 0.0


def test_names() -> None:
    names = set(declared_parameters(build_llama(_config(tie_embeddings=True), _place())))
    assert "embedding.word_embeddings.weight" in names
    assert "decoder.layers.2.self_attention.linear_qkv.weight" in names
    assert "decoder.final_norm.weight" in names
    assert "output_layer.weight" not in names
    assert "output_layer.weight" in declared_parameters(build_llama(_config(), _place()))
