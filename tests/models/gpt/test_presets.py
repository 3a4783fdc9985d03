"""Every preset against published numbers, written out once more here: config.json of GPT-2, Pythia
and GPT-NeoX, table 2.1 of the GPT-3 paper."""

import math
from typing import NamedTuple

import pytest
import torch

from core.config.transformer import RopeConfig, TransformerConfig, validate_transformer
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from models.gpt.config import PRESETS
from models.gpt.model import build_gpt


class Published(NamedTuple):
    layers: int
    hidden_size: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    dropout: float
    parameters: int
    """Tied weights counted once."""


GPT2 = {
    "gpt2": Published(12, 768, 12, 3072, 50257, 1024, 0.1, 124_439_808),
    "gpt2-medium": Published(24, 1024, 16, 4096, 50257, 1024, 0.1, 354_823_168),
    "gpt2-large": Published(36, 1280, 20, 5120, 50257, 1024, 0.1, 774_030_080),
    "gpt2-xl": Published(48, 1600, 25, 6400, 50257, 1024, 0.1, 1_557_611_200),
}
NEOX = {
    "pythia-70m": Published(6, 512, 8, 2048, 50304, 2048, 0.0, 70_426_624),
    "pythia-160m": Published(12, 768, 12, 3072, 50304, 2048, 0.0, 162_322_944),
    "pythia-410m": Published(24, 1024, 16, 4096, 50304, 2048, 0.0, 405_334_016),
    "pythia-1b": Published(16, 2048, 8, 8192, 50304, 2048, 0.0, 1_011_781_632),
    "pythia-1.4b": Published(24, 2048, 16, 8192, 50304, 2048, 0.0, 1_414_647_808),
    "pythia-2.8b": Published(32, 2560, 32, 10240, 50304, 2048, 0.0, 2_775_208_960),
    "pythia-6.9b": Published(32, 4096, 32, 16384, 50432, 2048, 0.0, 6_857_302_016),
    "pythia-12b": Published(36, 5120, 40, 20480, 50688, 2048, 0.0, 11_846_072_320),
    "gpt-neox-20b": Published(44, 6144, 64, 24576, 50432, 2048, 0.0, 20_554_567_680),
}
PYTHIA_NON_EMBEDDING = {
    "pythia-70m": 18_915_328,
    "pythia-160m": 85_056_000,
    "pythia-410m": 302_311_424,
    "pythia-1b": 805_736_448,
    "pythia-1.4b": 1_208_602_624,
    "pythia-2.8b": 2_517_652_480,
    "pythia-6.9b": 6_444_163_072,
    "pythia-12b": 11_327_027_200,
}
"""As its paper counts them."""

GPT3 = {  # n_params, n_layers, d_model, n_heads, d_head
    "gpt3-125m": (125e6, 12, 768, 12, 64),
    "gpt3-350m": (350e6, 24, 1024, 16, 64),
    "gpt3-760m": (760e6, 24, 1536, 16, 96),
    "gpt3-1.3b": (1.3e9, 24, 2048, 24, 128),
    "gpt3-2.7b": (2.7e9, 32, 2560, 32, 80),
    "gpt3-6.7b": (6.7e9, 32, 4096, 32, 128),
    "gpt3-13b": (13.0e9, 40, 5140, 40, 128),
    "gpt3-175b": (175.0e9, 96, 12288, 96, 128),
}
"""Table 2.1 as printed; a model has d_model = n_heads * d_head, which two rows have not."""

CORRECTED = {"gpt3-1.3b": (24, 2048, 16, 128), "gpt3-13b": (40, 5120, 40, 128)}


def parameter_count(config: TransformerConfig) -> int:
    """Parameters of a LayerNorm decoder with biases everywhere, tied weights counted once."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    attention = 4 * hidden * hidden + 4 * hidden
    mlp = 2 * hidden * ffn + ffn + hidden
    norms = 4 * hidden
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size
    tables += config.max_position_embeddings if config.position_embedding == "learned" else 0
    return config.num_layers * (attention + mlp + norms) + 2 * hidden + tables * hidden


def test_every_preset_is_in_a_table() -> None:
    assert set(PRESETS) == {"gpt-tiny", *GPT2, *GPT3, *NEOX}


@pytest.mark.parametrize("name", [*GPT2, *NEOX])
def test_preset_is_what_was_published(name: str) -> None:
    row = {**GPT2, **NEOX}[name]
    neox = name in NEOX
    # Equality of the whole: what the table does not name has to be what all of these models share.
    assert PRESETS[name]() == TransformerConfig(
        num_layers=row.layers,
        hidden_size=row.hidden_size,
        num_attention_heads=row.heads,
        num_query_groups=None,
        head_dim=None,
        ffn_hidden_size=row.ffn,
        vocab_size=row.vocab,
        max_position_embeddings=row.positions,
        position_embedding="rope" if neox else "learned",
        rope=RopeConfig(theta=1e4, partial_factor=0.25) if neox else RopeConfig(),
        normalization="layernorm",
        norm_epsilon=1e-5,
        # gelu_new of GPT-2 and gelu_fast of GPT-NeoX are the tanh form.
        activation="gelu" if name.startswith("pythia") else "gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        parallel_residual=neox,
        tie_embeddings=not neox,
        attention_dropout=row.dropout,
        hidden_dropout=row.dropout,
        init_std=0.02,
    )
    assert parameter_count(PRESETS[name]()) == row.parameters


@pytest.mark.parametrize("name", PYTHIA_NON_EMBEDDING)
def test_pythia_counts_without_embeddings(name: str) -> None:
    config = PRESETS[name]()
    tables = 2 * config.vocab_size * config.hidden_size
    assert parameter_count(config) - tables == PYTHIA_NON_EMBEDDING[name]


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_is_the_table_but_for_two_misprints(name: str) -> None:
    parameters, *printed = GPT3[name]
    config = PRESETS[name]()
    expected = CORRECTED.get(name, tuple(printed))
    sizes = (config.num_layers, config.hidden_size, config.num_attention_heads, config.kv_channels)
    assert sizes == expected
    consistent = printed[1] == printed[2] * printed[3]
    assert consistent == (name not in CORRECTED)
    assert abs(parameter_count(config) / parameters - 1) < 0.02
    assert config == TransformerConfig(
        num_layers=expected[0],
        hidden_size=expected[1],
        num_attention_heads=expected[2],
        ffn_hidden_size=4 * expected[1],
        vocab_size=50257,
        max_position_embeddings=2048,
        position_embedding="learned",
        normalization="layernorm",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
    )


def test_the_printed_heads_of_gpt3_xl_would_be_another_size() -> None:
    """Why its row is read as 16 heads: 24 would be 1.5B parameters."""
    config = PRESETS["gpt3-1.3b"]()
    extra = 4 * config.hidden_size * (24 * 128 - 2048) * config.num_layers
    assert 1.5e9 < parameter_count(config) + extra < 1.55e9


@pytest.mark.parametrize("name", PRESETS)
def test_preset_keeps_the_rules(name: str) -> None:
    validate_transformer(PRESETS[name]())


def test_tiny_fits_a_byte_level_run() -> None:
    config = PRESETS["gpt-tiny"]()
    assert config.vocab_size == 257
    assert 1_000_000 < parameter_count(config) < 2_000_000


@pytest.mark.parametrize("name", PRESETS)
def test_model_declares_the_same_count(name: str) -> None:
    device = torch.device("meta")
    place = Placement(ParallelContext.single(device), torch.bfloat16, device)
    declared = declared_parameters(build_gpt(PRESETS[name](), place))
    count = sum(math.prod(p.sharding.global_shape) for p in declared.values())
    assert count == parameter_count(PRESETS[name]())
