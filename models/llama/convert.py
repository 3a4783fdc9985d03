"""Llama, Mistral, Qwen2 and Qwen3 (dense) to and from Hugging Face.

`python -m models.llama.convert` is `python -m converters` bound to this family.
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from converters.decoders import build_decoder_model, decoder_logits, importer
from converters.hf_config import (
    activation_name,
    read_activation,
    read_rope,
    whole_number,
    write_rope,
)
from converters.rules import (
    Block,
    Condition,
    Family,
    Head,
    Ignore,
    LogitsProbe,
    Rule,
    always,
    architecture_of,
    has,
)
from core.config.transformer import TransformerConfig, canonical, validate_transformer
from core.errors import ConversionError

LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
QWEN2, QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"


@dataclass(frozen=True)
class HFClass:
    """What a Hugging Face class fixes, and its defaults for keys that config.json leaves out."""

    model_type: str
    biases: Literal["option", "qkv", "none"]
    """option: `attention_bias` turns on all four; qkv: always on q, k, v; none."""
    _: KW_ONLY
    mlp_bias: bool = False
    """Whether `mlp_bias` is an option."""
    qk_norm: bool = False
    windows: Literal["none", "all", "by_layer"] = "none"
    """Sliding window: never, on every layer, or by `layer_types`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)


_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}

CLASSES: Mapping[str, HFClass] = MappingProxyType(
    {
        LLAMA: HFClass(
            "llama", "option", mlp_bias=True, defaults={"max_position_embeddings": 2048}
        ),
        MISTRAL: HFClass("mistral", "none", windows="all", defaults=_MISTRAL),
        QWEN2: HFClass("qwen2", "qkv", windows="by_layer", defaults=_QWEN),
        QWEN3: HFClass(
            "qwen3", "option", qk_norm=True, windows="by_layer", defaults={**_QWEN, "head_dim": 128}
        ),
    }
)


def to_native(hf_config: Mapping[str, Any]) -> TransformerConfig:
    """The architecture that a config.json describes.

    Raises:
        ConversionError: an unknown class, activation or rope type, or a required key is missing.
        ConfigError: numbers that do not go together, such as heads that do not divide.
    """
    name = architecture_of(hf_config)
    if name not in CLASSES:
        raise ConversionError(
            f"config.json names {name}, which models/llama does not have: it has "
            f"{', '.join(CLASSES)}"
        )
    kind = CLASSES[name]
    entries = {**kind.defaults, **hf_config}

    def required(key: str) -> int:
        return whole_number(entries, key, name)

    rope = read_rope(hf_config)
    if rope.partial_factor != 1.0:
        raise ConversionError(
            f"config.json has partial_rotary_factor {rope.partial_factor}, but {name} rotates "
            "whole heads: remove it"
        )
    bias = kind.biases == "qkv" or (kind.biases == "option" and bool(entries.get("attention_bias")))
    window, layers = _windows(kind, entries, required("num_hidden_layers"))
    config = TransformerConfig(
        num_layers=required("num_hidden_layers"),
        hidden_size=required("hidden_size"),
        num_attention_heads=required("num_attention_heads"),
        num_query_groups=entries.get("num_key_value_heads"),
        head_dim=entries.get("head_dim"),
        ffn_hidden_size=required("intermediate_size"),
        vocab_size=required("vocab_size"),
        max_position_embeddings=required("max_position_embeddings"),
        rope=rope,
        norm_epsilon=float(entries.get("rms_norm_eps", 1e-6)),
        activation=read_activation(entries, "hidden_act", "silu"),
        qkv_bias=bias,
        attention_output_bias=bias and kind.biases == "option",
        mlp_bias=kind.mlp_bias and bool(entries.get("mlp_bias")),
        qk_norm="rmsnorm" if kind.qk_norm else "none",
        sliding_window=window,
        sliding_window_layers=layers,
        tie_embeddings=bool(entries.get("tie_word_embeddings")),
        attention_dropout=float(entries.get("attention_dropout") or 0.0),
        init_std=float(entries.get("initializer_range", 0.02)),
    )
    validate_transformer(config)
    return canonical(config)


def _windows(
    kind: HFClass, entries: Mapping[str, Any], num_layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    """Sliding window, and its layers where these are not all.

    Raises:
        ConversionError: `layer_types` that are not one known kind a layer.
    """
    window = entries.get("sliding_window")
    if kind.windows == "none" or window is None:
        return None, None
    if kind.windows == "all":
        return window, None
    if not entries.get("use_sliding_window"):
        return None, None
    first, known = entries.get("max_window_layers", 28), ("full_attention", "sliding_attention")
    types = entries.get("layer_types") or [known[layer >= first] for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= set(known):
        raise ConversionError(
            f"config.json has layer_types {types} for {num_layers} layers: give each of them one "
            f"of {', '.join(known)}"
        )
    chosen = tuple(layer for layer, kind in enumerate(types) if kind == known[1])
    if not chosen:
        return None, None
    return window, None if len(chosen) == num_layers else chosen


def to_hf(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The entries of config.json for a class, as far as it can say them.

    Raises:
        ConversionError: a hidden size that transformers refuses for Llama.
    """
    kind = CLASSES[architecture]
    if architecture == LLAMA and config.hidden_size % config.num_attention_heads:
        raise ConversionError(
            f"{LLAMA} needs a hidden_size that num_attention_heads divides, and these are "
            f"{config.hidden_size} and {config.num_attention_heads}"
        )
    entries: dict[str, Any] = {
        "model_type": kind.model_type,
        "architectures": [architecture],
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.kv_channels,
        "intermediate_size": config.ffn_hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": activation_name(config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.attention_dropout,
        "initializer_range": config.init_std,
        **write_rope(config.rope),
    }
    if kind.biases == "option":
        entries["attention_bias"] = config.qkv_bias
    if kind.mlp_bias:
        entries["mlp_bias"] = config.mlp_bias
    if kind.windows != "none":
        entries["sliding_window"] = config.sliding_window
    if kind.windows == "by_layer":
        sliding = [config.window_of(i) is not None for i in range(config.num_layers)]
        entries["use_sliding_window"] = any(sliding)
        # Readers that know no layer_types take all layers from this one on.
        entries["max_window_layers"] = sliding.index(True) if any(sliding) else config.num_layers
        entries["layer_types"] = [
            "sliding_attention" if chosen else "full_attention" for chosen in sliding
        ]
    return entries


def sizes(config: TransformerConfig) -> dict[str, int]:
    """The numbers that the table names."""
    return {
        "layer": config.num_layers,
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "vocab": config.vocab_size,
        "head_dim": config.kv_channels,
        "q_heads": config.num_attention_heads,
        "kv_heads": config.kv_heads,
        "attention": config.num_attention_heads * config.kv_channels,
    }


_TIED = has(lambda config: config.tie_embeddings)
_UNTIED = has(lambda config: not config.tie_embeddings)
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_HF, _OWN = "model.layers.{layer}.", "decoder.layers.{layer}."


def _linear(
    native: str, parts: Sequence[tuple[str, str]], inputs: str, bias: Condition
) -> tuple[Rule, Rule]:
    """Weight and bias of a native linear layer of which `parts` are the Hugging Face layers, each
    with the size of its output.
    """
    weight, offset = (
        tuple(
            Block(f"{_HF}{name}.{kind}", count, "head_dim" if "heads" in count else 1)
            for name, count in parts
        )
        for kind in ("weight", "bias")
    )
    return (
        Rule(native=f"{_OWN}{native}.weight", blocks=weight, other=(inputs,)),
        Rule(native=f"{_OWN}{native}.bias", blocks=offset, when=bias),
    )


def _norm(native: str, hf: str, size: str = "hidden", when: Condition = always) -> Rule:
    return Rule(native=f"{native}.weight", blocks=(Block(f"{hf}.weight", size),), when=when)


def _table(native: str, hf: tuple[str, ...], when: Condition) -> Rule:
    return Rule(native=native, blocks=(Block(hf, "vocab"),), other=("hidden",), when=when)


_QKV = (
    ("self_attn.q_proj", "q_heads"),
    ("self_attn.k_proj", "kv_heads"),
    ("self_attn.v_proj", "kv_heads"),
)
_GATE_UP = (("mlp.gate_proj", "ffn"), ("mlp.up_proj", "ffn"))
_QK_NORM = has(lambda config: config.qk_norm != "none")
_MLP_BIAS = has(lambda config: config.mlp_bias)

RULES = (
    _table("embedding.word_embeddings.weight", (_EMBEDDING,), _UNTIED),
    # A tied table may be saved under either name.
    _table("embedding.word_embeddings.weight", (_EMBEDDING, _OUTPUT), _TIED),
    _norm(f"{_OWN}input_norm", f"{_HF}input_layernorm"),
    *_linear("self_attention.linear_qkv", _QKV, "hidden", has(lambda config: config.qkv_bias)),
    _norm(f"{_OWN}self_attention.q_norm", f"{_HF}self_attn.q_norm", "head_dim", _QK_NORM),
    _norm(f"{_OWN}self_attention.k_norm", f"{_HF}self_attn.k_norm", "head_dim", _QK_NORM),
    *_linear(
        "self_attention.linear_proj",
        (("self_attn.o_proj", "hidden"),),
        "attention",
        has(lambda config: config.attention_output_bias),
    ),
    _norm(f"{_OWN}pre_mlp_norm", f"{_HF}post_attention_layernorm"),
    *_linear("mlp.linear_fc1", _GATE_UP, "hidden", _MLP_BIAS),
    *_linear("mlp.linear_fc2", (("mlp.down_proj", "hidden"),), "ffn", _MLP_BIAS),
    _norm("decoder.final_norm", "model.norm"),
    _table("output_layer.weight", (_OUTPUT,), _UNTIED),
)


FAMILY = Family(
    name="llama",
    architectures=tuple(CLASSES),
    rules=RULES,
    ignore=(
        Ignore(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from config.json"),
        # With both present, import has compared them before it takes the model as tied.
        Ignore(r"lm_head\.weight", "the same as the embedding", _TIED),
    ),
    sizes=sizes,
    to_native=to_native,
    to_hf=to_hf,
    config_class=TransformerConfig,
    canonical=canonical,
    incidental=TransformerConfig.INCIDENTAL,
    build_model=build_decoder_model,
    head=Head(embedding=(_EMBEDDING,), output=(_OUTPUT,)),
    probe=LogitsProbe(
        native_layers="decoder.layers",
        hf_layers=dict.fromkeys(CLASSES, "model.layers"),
        logits=decoder_logits,
    ),
)

import_weights = importer(FAMILY)


if __name__ == "__main__":
    from converters.__main__ import main

    main(family="llama")
