"""Every layer at every tensor-parallel layout computes what one process computes, in fp64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.backends.local import LocalSpecProvider
from core.config.parallel import ParallelConfig
from core.config.transformer import TransformerConfig
from core.layers.attention import CoreAttention, SelfAttention, SelfAttentionSubmodules
from core.layers.cross_attention import CrossAttention, CrossAttentionSubmodules
from core.layers.dropout import Dropout
from core.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from core.layers.forward_info import ForwardInfo
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.mlp import MLP, MLPSubmodules
from core.layers.norm import LayerNorm, RMSNorm
from core.layers.positions import LearnedPositions
from core.layers.rotary import RotaryEmbedding
from core.parallel.context import ParallelContext
from core.parallel.cutting import Block
from core.parallel.placement import Placement
from core.parallel.random import ZEROS, DropoutKey
from core.parallel.sharding import declared_parameters
from core.spec import ModuleSpec
from core.testing.distributed import WorkerPool
from core.testing.layouts import LayerCase, run_case
from core.testing.parity import assert_close
from core.transformer.layer import TransformerLayer, TransformerLayerSubmodules
from core.transformer.parallel_layer import ParallelResidualLayer, ParallelResidualLayerSubmodules

CPU = torch.device("cpu")
LAYOUTS = [(2, False), (2, True), (4, False), (4, True)]
S, B, H, Z = 8, 3, 24, 12
KEY = DropoutKey(seed=5, step=2, first_sample=9)
BACKEND = LocalSpecProvider()
COLUMN, ROW = ModuleSpec(ColumnParallelLinear), ModuleSpec(RowParallelLinear)
CORE = ModuleSpec(CoreAttention)


def _x(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _config(**changes: Any) -> TransformerConfig:
    """2 key heads: at tp 4 two ranks share one. Heads are not hidden_size / 4 wide."""
    base = TransformerConfig(
        num_layers=2,
        hidden_size=H,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        ffn_hidden_size=20,
        vocab_size=67,
        max_position_embeddings=64,
    )
    return dataclasses.replace(base, **changes)


BIASES = {"qkv_bias": True, "attention_output_bias": True, "mlp_bias": True}


def _info(config: TransformerConfig) -> ForwardInfo:
    tables = RotaryEmbedding(config.rope, config.kv_channels)(S, CPU)
    dropped = config.hidden_dropout + config.attention_dropout > 0
    return ForwardInfo(tables, KEY if dropped else None)


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """What the caller of a layer does with the bias that it leaves out."""
    return y if bias is None else y + bias


# ---- Linear layers -------------------------------------------------------------------------------


def _column(**kwargs: Any) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        blocks = [Block(4, 3), Block(2, 3), Block(2, 3)]
        module = ColumnParallelLinear(place, H, blocks, init=ZEROS, **kwargs)
        copies = declared_parameters(module)["weight"].sharding.copies

        def forward(x: Tensor) -> Tensor:
            # Not contiguous, which NCCL's collectives would refuse.
            y = module(x.transpose(0, 1).contiguous().transpose(0, 1))
            return _with_bias(y, module.bias) if module.skip_bias_add else y

        return LayerCase(module, forward, ((_x(S, B, H), "sequence"),), copies)

    return build


def _row(**kwargs: Any) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = RowParallelLinear(place, Block(4, 5), H, init=ZEROS, **kwargs)

        def forward(x: Tensor) -> Tensor:
            y: Tensor = module(x)
            return _with_bias(y, module.bias) if module.skip_bias_add else y

        return LayerCase(module, forward, ((_x(S, B, 20), "last"),))

    return build


# ---- Vocabulary ----------------------------------------------------------------------------------


def _tokens(vocab: int) -> Tensor:
    tokens = torch.randint(vocab, (B, S), generator=torch.Generator().manual_seed(1))
    tokens[0, 0], tokens[0, 1], tokens[1, :3] = 0, vocab - 1, 5  # both ends, and a repeated one
    return tokens


def _embedding(vocab: int) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = VocabParallelEmbedding(place, vocab, H, init=ZEROS)
        return LayerCase(module, lambda: module(_tokens(vocab)))

    return build


def _positions(*, packed: bool) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = LearnedPositions(place, 11, H, init=ZEROS)
        positions = torch.arange(S).roll(3) if packed else None
        given = None if positions is None else torch.stack([positions, positions % 2, positions])
        # Added to something of the whole batch, as positions are.
        inputs = ((_x(S, B, H), "sequence"),)
        return LayerCase(module, lambda x: x + module(S, given), inputs)  # type: ignore[arg-type]

    return build


def _head(vocab: int) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = VocabParallelHead(place, vocab, H, init=ZEROS)
        copies = declared_parameters(module)["weight"].sharding.copies
        return LayerCase(module, module, ((_x(S, B, H), "sequence"),), copies)

    return build


def _tied(place: Placement) -> LayerCase:
    table = VocabParallelEmbedding(place, 67, H, init=ZEROS)
    head = VocabParallelHead(place, 67, H, init=ZEROS, tied_to=table)
    module = nn.ModuleDict({"table": table, "head": head})
    parameters = declared_parameters(module)
    assert list(parameters) == ["table.weight"]
    copies = parameters["table.weight"].sharding.copies
    return LayerCase(module, lambda: head(table(_tokens(67)).tanh()), (), copies)


# ---- Norms, dropout, MLP -------------------------------------------------------------------------


def _norm(kind: type[RMSNorm] | type[LayerNorm]) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = kind(place, H, 1e-5)
        return LayerCase(module, module, ((_x(S, B, H), "sequence"),))

    return build


def _head_norm(place: Placement) -> LayerCase:
    module = RMSNorm(place, 6, 1e-5, per_head=True)
    inputs = ((_x(S, B, H), "last"),)

    def forward(x: Tensor) -> Tensor:
        return module(x.unflatten(-1, (-1, 6))).flatten(2)

    return LayerCase(module, forward, inputs, "last")  # type: ignore[arg-type]


def _dropout(place: Placement) -> LayerCase:
    module = Dropout(place.ctx, 0.4, "somewhere")
    return LayerCase(module, lambda x: module(x, KEY), ((_x(S, B, H), "sequence"),))


def _mlp(**changes: Any) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        module = MLP(_config(**changes), place, submodules=MLPSubmodules(COLUMN, ROW))

        def forward(x: Tensor) -> Tensor:
            y: Tensor = module(x)
            return _with_bias(y, module.output_bias)

        return LayerCase(module, forward, ((_x(S, B, H), "sequence"),))

    return build


# ---- Attention and whole layers ------------------------------------------------------------------


def _self_attention_spec(config: TransformerConfig, **params: Any) -> ModuleSpec[Any]:
    submodules = SelfAttentionSubmodules(COLUMN, CORE, ROW)
    if config.qk_norm != "none":
        norm = BACKEND.norm(config.qk_norm)
        submodules = dataclasses.replace(submodules, q_norm=norm, k_norm=norm)
    return ModuleSpec(SelfAttention, params=params, submodules=submodules)


def _self_attention(
    *, causal: bool = True, window: int | None = None, **changes: Any
) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        config = _config(**changes)
        spec = _self_attention_spec(config)
        assert isinstance(spec.submodules, SelfAttentionSubmodules)
        module = SelfAttention(
            config, place, name="layer", submodules=spec.submodules, causal=causal, window=window
        )

        def forward(x: Tensor) -> Tensor:
            y: Tensor = module(x, _info(config))
            return _with_bias(y, module.output_bias)

        return LayerCase(module, forward, ((_x(S, B, H), "sequence"),))

    return build


def _cross_attention(**changes: Any) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        config = _config(**changes)
        module = CrossAttention(
            config,
            place,
            name="layer",
            submodules=CrossAttentionSubmodules(COLUMN, COLUMN, CORE, ROW),
        )

        def forward(x: Tensor, encoded: Tensor) -> Tensor:
            y: Tensor = module(x, dataclasses.replace(_info(config), encoded=encoded))
            return _with_bias(y, module.output_bias)

        inputs = ((_x(S, B, H), "sequence"), (_x(Z, B, H, seed=1), "sequence"))
        return LayerCase(module, forward, inputs)  # type: ignore[arg-type]

    return build


def _layer(
    *, cross: bool = False, post: bool = False, **changes: Any
) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        config = _config(**changes)
        norm = BACKEND.norm(config.normalization)
        extra: dict[str, Any] = {}
        if cross:
            submodules = CrossAttentionSubmodules(COLUMN, COLUMN, CORE, ROW)
            extra["cross_attention"] = ModuleSpec(CrossAttention, submodules=submodules)
            extra["cross_attention_norm"] = norm
        if post:
            extra |= {"post_attention_norm": norm, "post_mlp_norm": norm}
        parts = TransformerLayerSubmodules(
            input_norm=norm,
            self_attention=_self_attention_spec(config, causal=True, window=5),
            pre_mlp_norm=norm,
            mlp=ModuleSpec(MLP, submodules=MLPSubmodules(COLUMN, ROW)),
            **extra,
        )
        module = TransformerLayer(config, place, name="decoder.layers.1", submodules=parts)
        inputs = [(_x(S, B, H), "sequence")]
        if cross:
            inputs.append((_x(Z, B, H, seed=1), "sequence"))

        def forward(x: Tensor, encoded: Tensor | None = None) -> Tensor:
            out: Tensor = module(x, dataclasses.replace(_info(config), encoded=encoded))
            return out

        return LayerCase(module, forward, tuple(inputs))  # type: ignore[arg-type]

    return build


def _parallel_layer(**changes: Any) -> Callable[[Placement], LayerCase]:
    def build(place: Placement) -> LayerCase:
        config = _config(**changes)
        norm = BACKEND.norm(config.normalization)
        parts = ParallelResidualLayerSubmodules(
            input_norm=norm,
            self_attention=_self_attention_spec(config, causal=True),
            pre_mlp_norm=norm,
            mlp=ModuleSpec(MLP, submodules=MLPSubmodules(COLUMN, ROW)),
        )
        module = ParallelResidualLayer(config, place, name="decoder.layers.1", submodules=parts)

        def forward(x: Tensor) -> Tensor:
            out: Tensor = module(x, _info(config))
            return out

        return LayerCase(module, forward, ((_x(S, B, H), "sequence"),))

    return build


DROPOUT: dict[str, Any] = {"attention_dropout": 0.2, "hidden_dropout": 0.3}

CASES: dict[str, Callable[[Placement], LayerCase]] = {
    "column": _column(),
    "column, bias": _column(bias=True),
    "column, bias left to the caller": _column(bias=True, skip_bias_add=True),
    "row": _row(),
    "row, bias": _row(bias=True),
    "row, bias left to the caller": _row(bias=True, skip_bias_add=True),
    "embedding": _embedding(67),
    "embedding, ranks without tokens": _embedding(9),
    "positions": _positions(packed=False),
    "positions, packed": _positions(packed=True),
    "head": _head(67),
    "head, ranks without tokens": _head(9),
    "head tied to the embedding": _tied,
    "rmsnorm": _norm(RMSNorm),
    "layernorm": _norm(LayerNorm),
    "norm of heads": _head_norm,
    "dropout": _dropout,
    "gated mlp": _mlp(),
    "gated mlp, biases": _mlp(mlp_bias=True, activation="gelu_tanh"),
    "plain mlp": _mlp(gated_mlp=False, activation="gelu"),
    "plain mlp, biases": _mlp(gated_mlp=False, mlp_bias=True, activation="relu"),
    "self-attention": _self_attention(),
    "self-attention, one key head": _self_attention(num_query_groups=1, qkv_bias=True),
    "self-attention, all heads": _self_attention(num_query_groups=4, qk_norm="layernorm"),
    "self-attention, biases and qk norm": _self_attention(qk_norm="rmsnorm", **BIASES),
    "self-attention, window": _self_attention(window=3, **BIASES),
    "self-attention, bidirectional": _self_attention(causal=False, attention_scale=0.7),
    "self-attention, dropout": _self_attention(attention_dropout=0.3),
    "cross-attention": _cross_attention(**BIASES),
    "cross-attention, dropout": _cross_attention(attention_dropout=0.3, num_query_groups=4),
    "layer": _layer(),
    "layer, everything": _layer(cross=True, post=True, qk_norm="rmsnorm", **BIASES),
    "layer, everything, dropout": _layer(
        cross=True, post=True, normalization="layernorm", **BIASES, **DROPOUT
    ),
    "layer, dropout": _layer(**DROPOUT),
    "parallel layer": _parallel_layer(**BIASES),
    "parallel layer, dropout": _parallel_layer(normalization="layernorm", **BIASES, **DROPOUT),
}


def _run_all(ctx: ParallelContext) -> dict[str, dict[str, Tensor]]:
    place = Placement(ctx, torch.float64, CPU)
    return {name: run_case(build(place), ctx) for name, build in CASES.items()}


def _run_rank(tp: int, sequence_parallel: bool) -> dict[str, dict[str, Tensor]]:
    config = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    ctx = ParallelContext.create(config, CPU)
    results = _run_all(ctx)
    return results if ctx.world.rank == 0 else {}


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Tensor]]:
    return _run_all(ParallelContext.single())


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda x: f"tp{x[0]}{'-sp' * x[1]}")
def layout(request: pytest.FixtureRequest, pool: WorkerPool) -> dict[str, dict[str, Tensor]]:
    tp, sequence_parallel = request.param
    results: dict[str, dict[str, Tensor]] = pool.run(_run_rank, tp, tp, sequence_parallel)[0]
    return results


@pytest.mark.parametrize("name", CASES)
def test_layout_computes_what_one_process_does(
    name: str,
    single: dict[str, dict[str, Tensor]],
    layout: dict[str, dict[str, Tensor]],
) -> None:
    actual, expected = layout[name], single[name]
    assert actual.keys() == expected.keys()
    for what in expected:
        # Another dropout mask anywhere would show as a difference of the order of 1.
        assert_close(actual[what], expected[what], 1e-12 if what == "output" else 1e-9, what)
        # Nothing is trivially equal.
        assert expected[what].abs().max().item() > 1e-6, what
