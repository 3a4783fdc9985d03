"""Architectures of the GPT family: a `TransformerConfig` each, named as in `--preset`.

GPT-2, Pythia and GPT-NeoX follow the `config.json` of the Hugging Face repository that their
docstring names, GPT-3 table 2.1 of its paper (Brown et al., "Language Models are Few-Shot
Learners", 2020). GPT-3 attends sparsely in every other layer, with a pattern that was not
published; here all layers see the whole sequence.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from core.config.transformer import RopeConfig, TransformerConfig


def gpt2() -> TransformerConfig:
    """`openai-community/gpt2`."""
    return TransformerConfig(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        ffn_hidden_size=3072,
        vocab_size=50257,
        max_position_embeddings=1024,
        position_embedding="learned",
        normalization="layernorm",
        activation="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        attention_dropout=0.1,
        hidden_dropout=0.1,
    )


def _wider(base: TransformerConfig, layers: int, hidden: int, heads: int) -> TransformerConfig:
    """The same with other sizes; the MLP is four times as wide as the model, as everywhere here."""
    return replace(
        base,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=4 * hidden,
    )


def gpt_tiny() -> TransformerConfig:
    """A small GPT-2 of 1.6M parameters over bytes, for two CPU cores."""
    small = _wider(gpt2(), layers=4, hidden=168, heads=6)
    return replace(small, vocab_size=257, attention_dropout=0.0, hidden_dropout=0.0)


def gpt2_medium() -> TransformerConfig:
    """`openai-community/gpt2-medium`."""
    return _wider(gpt2(), layers=24, hidden=1024, heads=16)


def gpt2_large() -> TransformerConfig:
    """`openai-community/gpt2-large`."""
    return _wider(gpt2(), layers=36, hidden=1280, heads=20)


def gpt2_xl() -> TransformerConfig:
    """`openai-community/gpt2-xl`."""
    return _wider(gpt2(), layers=48, hidden=1600, heads=25)


def gpt3_125m() -> TransformerConfig:
    """GPT-3 Small: a GPT-2 of twice the context. The paper names no dropout."""
    return replace(gpt2(), max_position_embeddings=2048, attention_dropout=0.0, hidden_dropout=0.0)


def gpt3_350m() -> TransformerConfig:
    """GPT-3 Medium."""
    return _wider(gpt3_125m(), layers=24, hidden=1024, heads=16)


def gpt3_760m() -> TransformerConfig:
    """GPT-3 Large."""
    return _wider(gpt3_125m(), layers=24, hidden=1536, heads=16)


def gpt3_1_3b() -> TransformerConfig:
    """GPT-3 XL. The table prints 24 heads of 128, which would be wider than the model (2048) and
    make 1.5B parameters: 16 of them give the 1.3B of its name.
    """
    return _wider(gpt3_125m(), layers=24, hidden=2048, heads=16)


def gpt3_2_7b() -> TransformerConfig:
    """GPT-3 2.7B."""
    return _wider(gpt3_125m(), layers=32, hidden=2560, heads=32)


def gpt3_6_7b() -> TransformerConfig:
    """GPT-3 6.7B."""
    return _wider(gpt3_125m(), layers=32, hidden=4096, heads=32)


def gpt3_13b() -> TransformerConfig:
    """GPT-3 13B. The table prints a width of 5140, where 40 heads of 128 make 5120."""
    return _wider(gpt3_125m(), layers=40, hidden=5120, heads=40)


def gpt3_175b() -> TransformerConfig:
    """GPT-3 175B."""
    return _wider(gpt3_125m(), layers=96, hidden=12288, heads=96)


def pythia_70m() -> TransformerConfig:
    """`EleutherAI/pythia-70m`."""
    return TransformerConfig(
        num_layers=6,
        hidden_size=512,
        num_attention_heads=8,
        ffn_hidden_size=2048,
        vocab_size=50304,
        max_position_embeddings=2048,
        rope=RopeConfig(partial_factor=0.25),
        normalization="layernorm",
        activation="gelu",
        gated_mlp=False,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        parallel_residual=True,
    )


def pythia_160m() -> TransformerConfig:
    """`EleutherAI/pythia-160m`."""
    return _wider(pythia_70m(), layers=12, hidden=768, heads=12)


def pythia_410m() -> TransformerConfig:
    """`EleutherAI/pythia-410m`."""
    return _wider(pythia_70m(), layers=24, hidden=1024, heads=16)


def pythia_1b() -> TransformerConfig:
    """`EleutherAI/pythia-1b`."""
    return _wider(pythia_70m(), layers=16, hidden=2048, heads=8)


def pythia_1_4b() -> TransformerConfig:
    """`EleutherAI/pythia-1.4b`."""
    return _wider(pythia_70m(), layers=24, hidden=2048, heads=16)


def pythia_2_8b() -> TransformerConfig:
    """`EleutherAI/pythia-2.8b`."""
    return _wider(pythia_70m(), layers=32, hidden=2560, heads=32)


def pythia_6_9b() -> TransformerConfig:
    """`EleutherAI/pythia-6.9b`."""
    return replace(_wider(pythia_70m(), layers=32, hidden=4096, heads=32), vocab_size=50432)


def pythia_12b() -> TransformerConfig:
    """`EleutherAI/pythia-12b`."""
    return replace(_wider(pythia_70m(), layers=36, hidden=5120, heads=40), vocab_size=50688)


def gpt_neox_20b() -> TransformerConfig:
    """`EleutherAI/gpt-neox-20b`."""
    wide = _wider(pythia_70m(), layers=44, hidden=6144, heads=64)
    return replace(wide, vocab_size=50432, activation="gelu_tanh")


PRESETS: Mapping[str, Callable[[], TransformerConfig]] = MappingProxyType(
    {
        "gpt-tiny": gpt_tiny,
        "gpt2": gpt2,
        "gpt2-medium": gpt2_medium,
        "gpt2-large": gpt2_large,
        "gpt2-xl": gpt2_xl,
        "gpt3-125m": gpt3_125m,
        "gpt3-350m": gpt3_350m,
        "gpt3-760m": gpt3_760m,
        "gpt3-1.3b": gpt3_1_3b,
        "gpt3-2.7b": gpt3_2_7b,
        "gpt3-6.7b": gpt3_6_7b,
        "gpt3-13b": gpt3_13b,
        "gpt3-175b": gpt3_175b,
        "pythia-70m": pythia_70m,
        "pythia-160m": pythia_160m,
        "pythia-410m": pythia_410m,
        "pythia-1b": pythia_1b,
        "pythia-1.4b": pythia_1_4b,
        "pythia-2.8b": pythia_2_8b,
        "pythia-6.9b": pythia_6_9b,
        "pythia-12b": pythia_12b,
        "gpt-neox-20b": gpt_neox_20b,
    }
)
"""Every preset by its name on the command line."""
