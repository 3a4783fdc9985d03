"""GPT-2 and GPT-NeoX (Pythia too) to and from Hugging Face.

`python -m models.gpt.convert` is `python -m converters` bound to this family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    Size,
    architecture_of,
    has,
)
from core.config.transformer import TransformerConfig, canonical, validate_transformer
from core.errors import ConversionError

GPT2, NEOX = "GPT2LMHeadModel", "GPTNeoXForCausalLM"


# ---- config.json ---------------------------------------------------------------------------------

_ALWAYS: dict[str, Any] = {"normalization": "layernorm", "gated_mlp": False, "mlp_bias": True}
"""What the classes have in common and config.json does not say."""


def _read_gpt2(entries: Mapping[str, Any]) -> TransformerConfig:
    for key, only in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if entries.get(key, only) != only:
            raise ConversionError(
                f"config.json has {key} {entries[key]}, and only {only} is supported: the model "
                "computes something else"
            )
    hidden = whole_number(entries, "n_embd", GPT2)
    return TransformerConfig(
        num_layers=whole_number(entries, "n_layer", GPT2),
        hidden_size=hidden,
        num_attention_heads=whole_number(entries, "n_head", GPT2),
        ffn_hidden_size=entries.get("n_inner") or 4 * hidden,
        vocab_size=whole_number(entries, "vocab_size", GPT2),
        max_position_embeddings=whole_number(entries, "n_positions", GPT2),
        position_embedding="learned",
        norm_epsilon=float(entries.get("layer_norm_epsilon", 1e-5)),
        activation=read_activation(entries, "activation_function", "gelu_new"),
        qkv_bias=True,
        attention_output_bias=True,
        tie_embeddings=bool(entries.get("tie_word_embeddings", True)),
        attention_dropout=float(entries.get("attn_pdrop", 0.1)),
        hidden_dropout=float(entries.get("resid_pdrop", 0.1)),
        init_std=float(entries.get("initializer_range", 0.02)),
        **_ALWAYS,
    )


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    tanh = config.activation == "gelu_tanh"
    return {
        "n_layer": config.num_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_epsilon,
        # The name that this class has always had for it.
        "activation_function": "gelu_new" if tanh else activation_name(config.activation),
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
    }


def _read_neox(entries: Mapping[str, Any]) -> TransformerConfig:
    # The class has names of its own for these, which stand beside rope_parameters or in its place.
    rope = {
        **entries,
        "rope_theta": entries.get("rotary_emb_base", 10000.0),
        "partial_rotary_factor": entries.get("rotary_pct", 0.25),
    }
    bias = bool(entries.get("attention_bias", True))
    return TransformerConfig(
        num_layers=whole_number(entries, "num_hidden_layers", NEOX),
        hidden_size=whole_number(entries, "hidden_size", NEOX),
        num_attention_heads=whole_number(entries, "num_attention_heads", NEOX),
        ffn_hidden_size=whole_number(entries, "intermediate_size", NEOX),
        vocab_size=whole_number(entries, "vocab_size", NEOX),
        max_position_embeddings=entries.get("max_position_embeddings", 2048),
        rope=read_rope(rope),
        norm_epsilon=float(entries.get("layer_norm_eps", 1e-5)),
        activation=read_activation(entries, "hidden_act", "gelu"),
        qkv_bias=bias,
        attention_output_bias=bias,
        parallel_residual=bool(entries.get("use_parallel_residual", True)),
        tie_embeddings=bool(entries.get("tie_word_embeddings", False)),
        attention_dropout=float(entries.get("attention_dropout") or 0.0),
        hidden_dropout=float(entries.get("hidden_dropout") or 0.0),
        init_std=float(entries.get("initializer_range", 0.02)),
        **_ALWAYS,
    )


def _write_neox(config: TransformerConfig) -> dict[str, Any]:
    rope = write_rope(config.rope)
    return {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": activation_name(config.activation),
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_residual,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "rope_parameters": rope["rope_parameters"],
        "rope_scaling": rope["rope_scaling"],
        "rotary_emb_base": config.rope.theta,
        "rotary_pct": config.rope.partial_factor,
    }


# ---- Tensors -------------------------------------------------------------------------------------

Flag = Callable[[TransformerConfig], object]

_WORDS, _POSITIONS = "embedding.word_embeddings", "embedding.position_embeddings"
_OWN = "decoder.layers.{layer}."
_INPUT_NORM, _MLP_NORM = f"{_OWN}input_norm", f"{_OWN}pre_mlp_norm"
_QKV, _PROJ = f"{_OWN}self_attention.linear_qkv", f"{_OWN}self_attention.linear_proj"
_FC1, _FC2 = f"{_OWN}mlp.linear_fc1", f"{_OWN}mlp.linear_fc2"
_FINAL_NORM = "decoder.final_norm"


@dataclass(frozen=True, kw_only=True)
class HFClass:
    """What sets a Hugging Face class apart: its config.json, its names, and how its tensors lie."""

    model_type: str
    read: Callable[[Mapping[str, Any]], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    position_embedding: Literal["learned", "rope"]
    """What the class alone has, and therefore tells which names the tensors of a model have."""
    layers: str
    """Path of the layers in the model of `transformers`."""
    prefixes: tuple[str, ...]
    """What stands before all names but the head's, with its variants."""
    names: Mapping[str, str]
    """Native module to that on disk."""
    head: tuple[str, ...]
    """The head's weight, with its variants."""
    transposed: bool
    """Weights of linear layers are `[in, out]`."""
    qkv_starts: tuple[Size, ...]
    """Where the first head's query, key and value begin in the fused projection."""
    qkv_pitch: Size = 0
    """From one head's to the next one's; 0: all queries, then all keys, then all values."""

    def on_disk(self, native: str, what: str) -> tuple[str, ...]:
        """The variants of a tensor's name."""
        return tuple(f"{prefix}{self.names[native]}.{what}" for prefix in self.prefixes)

    def having(self, flag: Flag = lambda config: True) -> Condition:
        """The condition of rules for those models of the class that have something."""
        return has(lambda c: c.position_embedding == self.position_embedding and flag(c))


CLASSES: Mapping[str, HFClass] = MappingProxyType(
    {
        GPT2: HFClass(
            model_type="gpt2",
            read=_read_gpt2,
            write=_write_gpt2,
            position_embedding="learned",
            layers="transformer.h",
            prefixes=("transformer.", ""),  # OpenAI's own files have none
            names={
                _WORDS: "wte",
                _POSITIONS: "wpe",
                _INPUT_NORM: "h.{layer}.ln_1",
                _QKV: "h.{layer}.attn.c_attn",
                _PROJ: "h.{layer}.attn.c_proj",
                _MLP_NORM: "h.{layer}.ln_2",
                _FC1: "h.{layer}.mlp.c_fc",
                _FC2: "h.{layer}.mlp.c_proj",
                _FINAL_NORM: "ln_f",
            },
            head=("lm_head.weight",),
            transposed=True,
            qkv_starts=(0, "attention", "2 attention"),
        ),
        NEOX: HFClass(
            model_type="gpt_neox",
            read=_read_neox,
            write=_write_neox,
            position_embedding="rope",
            layers="gpt_neox.layers",
            prefixes=("gpt_neox.",),
            names={
                _WORDS: "embed_in",
                _INPUT_NORM: "layers.{layer}.input_layernorm",
                _QKV: "layers.{layer}.attention.query_key_value",
                _PROJ: "layers.{layer}.attention.dense",
                _MLP_NORM: "layers.{layer}.post_attention_layernorm",
                _FC1: "layers.{layer}.mlp.dense_h_to_4h",
                _FC2: "layers.{layer}.mlp.dense_4h_to_h",
                _FINAL_NORM: "final_layer_norm",
            },
            head=("embed_out.weight", "lm_head.weight"),  # the latter is transformers' name for it
            transposed=False,
            qkv_starts=(0, "head_dim", "2 head_dim"),
            qkv_pitch="3 head_dim",
        ),
    }
)


def sizes(config: TransformerConfig) -> dict[str, int]:
    """The numbers that the table names."""
    head_dim, attention = config.kv_channels, config.num_attention_heads * config.kv_channels
    return {
        "layer": config.num_layers,
        "hidden": config.hidden_size,
        "ffn": config.ffn_hidden_size,
        "vocab": config.vocab_size,
        "positions": config.max_position_embeddings,
        "heads": config.num_attention_heads,
        "head_dim": head_dim,
        "2 head_dim": 2 * head_dim,
        "3 head_dim": 3 * head_dim,
        "attention": attention,
        "2 attention": 2 * attention,
    }


def _linear(
    kind: HFClass, native: str, rows: Sequence[tuple[Size, ...]], columns: Size, bias: Flag
) -> tuple[Rule, Rule]:
    """Weight and bias of a linear layer whose output features are blocks of `rows`: count, unit,
    start and pitch of each.
    """
    weight, offset = (
        tuple(Block(kind.on_disk(native, what), *block) for block in rows)
        for what in ("weight", "bias")
    )
    return (
        Rule(
            native=f"{native}.weight",
            blocks=weight,
            other=(columns,),
            transposed=kind.transposed,
            when=kind.having(),
        ),
        Rule(native=f"{native}.bias", blocks=offset, when=kind.having(bias)),
    )


def _norm(kind: HFClass, native: str) -> Iterator[Rule]:
    for what in ("weight", "bias"):
        block = Block(kind.on_disk(native, what), "hidden")
        yield Rule(native=f"{native}.{what}", blocks=(block,), when=kind.having())


def _table(native: str, hf: tuple[str, ...], rows: Size, when: Condition) -> Rule:
    return Rule(native=f"{native}.weight", blocks=(Block(hf, rows),), other=("hidden",), when=when)


def _mlp_bias(config: TransformerConfig) -> bool:
    return config.mlp_bias


def _rules(kind: HFClass) -> Iterator[Rule]:
    """The table of one class."""
    tied = kind.having(lambda config: config.tie_embeddings)
    untied = kind.having(lambda config: not config.tie_embeddings)
    words = kind.on_disk(_WORDS, "weight")
    qkv = [("heads", "head_dim", start, kind.qkv_pitch) for start in kind.qkv_starts]
    yield _table(_WORDS, words, "vocab", untied)
    # A tied table may be saved under either name.
    yield _table(_WORDS, words + kind.head, "vocab", tied)
    if _POSITIONS in kind.names:
        yield _table(_POSITIONS, kind.on_disk(_POSITIONS, "weight"), "positions", kind.having())
    yield from _norm(kind, _INPUT_NORM)
    yield from _linear(kind, _QKV, qkv, "hidden", lambda config: config.qkv_bias)
    yield from _linear(
        kind, _PROJ, [("hidden",)], "attention", lambda config: config.attention_output_bias
    )
    yield from _norm(kind, _MLP_NORM)
    yield from _linear(kind, _FC1, [("ffn",)], "hidden", _mlp_bias)
    yield from _linear(kind, _FC2, [("hidden",)], "ffn", _mlp_bias)
    yield from _norm(kind, _FINAL_NORM)
    yield _table("output_layer", kind.head, "vocab", untied)


# ---- The family ----------------------------------------------------------------------------------


def to_native(hf_config: Mapping[str, Any]) -> TransformerConfig:
    """The architecture that a config.json describes.

    Raises:
        ConversionError: an unknown class, activation or rope type, an option that is not supported,
            or a required key is missing.
        ConfigError: numbers that do not go together, such as heads that do not divide.
    """
    name = architecture_of(hf_config)
    if name not in CLASSES:
        raise ConversionError(
            f"config.json names {name}, which models/gpt does not have: it has {', '.join(CLASSES)}"
        )
    config = CLASSES[name].read(hf_config)
    validate_transformer(config)
    return canonical(config)


def to_hf(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The entries of config.json for a class, as far as it can say them.

    Raises:
        ConversionError: a width that the heads do not divide, which both classes refuse.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ConversionError(
            f"{architecture} needs a hidden_size that num_attention_heads divides, and these are "
            f"{config.hidden_size} and {config.num_attention_heads}"
        )
    kind = CLASSES[architecture]
    return {
        "model_type": kind.model_type,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **kind.write(config),
    }


FAMILY = Family(
    name="gpt",
    architectures=tuple(CLASSES),
    rules=tuple(rule for kind in CLASSES.values() for rule in _rules(kind)),
    ignore=(
        Ignore(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", "a causal mask"),
        Ignore(r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias", "a causal mask"),
        Ignore(
            r"gpt_neox\.(layers\.\d+\.attention\.)?rotary_emb\.inv_freq",
            "computed from config.json",
        ),
        # With both present, import has compared them before it takes the model as tied.
        Ignore(
            r"(lm_head|embed_out)\.weight",
            "the same as the embedding",
            has(lambda config: config.tie_embeddings),
        ),
    ),
    sizes=sizes,
    to_native=to_native,
    to_hf=to_hf,
    config_class=TransformerConfig,
    canonical=canonical,
    incidental=TransformerConfig.INCIDENTAL,
    build_model=build_decoder_model,
    head=Head(
        embedding=tuple(n for kind in CLASSES.values() for n in kind.on_disk(_WORDS, "weight")),
        output=tuple(dict.fromkeys(name for kind in CLASSES.values() for name in kind.head)),
    ),
    probe=LogitsProbe(
        native_layers="decoder.layers",
        hf_layers={name: kind.layers for name, kind in CLASSES.items()},
        logits=decoder_logits,
    ),
)

import_weights = importer(FAMILY)


if __name__ == "__main__":
    from converters.__main__ import main

    main(family="gpt")
