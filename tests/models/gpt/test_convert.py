"""config.json field by field: against `transformers`' own reading of the same file, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from converters.hf_config import differing_fields, merge_config
from core.config.transformer import RopeConfig, TransformerConfig, canonical
from core.errors import ConfigError, ConversionError
from core.testing.hf_models import GPT
from models.gpt.convert import CLASSES, FAMILY, GPT2, NEOX, to_hf, to_native
from models.registry import FAMILIES

SIZES: dict[str, dict[str, Any]] = {
    GPT2: {"vocab_size": 67, "n_embd": 48, "n_layer": 3, "n_head": 8, "n_positions": 99},
    NEOX: {
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    },
}


def entries(architecture: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES[architecture], **more}


def read_by_transformers(folder: Path, given: dict[str, Any]) -> Any:
    import transformers

    kind = CLASSES[given["architectures"][0]].model_type
    (folder / "config.json").write_text(json.dumps({**given, "model_type": kind}))
    return transformers.AutoConfig.from_pretrained(folder)


def said(theirs: Any, architecture: str) -> TransformerConfig:
    """What a config object of transformers says."""
    common: dict[str, Any] = {
        "num_layers": theirs.num_hidden_layers,
        "hidden_size": theirs.hidden_size,
        "num_attention_heads": theirs.num_attention_heads,
        "num_query_groups": theirs.num_attention_heads,
        "head_dim": theirs.hidden_size // theirs.num_attention_heads,
        "vocab_size": theirs.vocab_size,
        "max_position_embeddings": theirs.max_position_embeddings,
        "normalization": "layernorm",
        "gated_mlp": False,
        "mlp_bias": True,
        "tie_embeddings": theirs.tie_word_embeddings,
        "init_std": theirs.initializer_range,
    }
    tanh = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    names = {"gelu": "gelu", **dict.fromkeys(tanh, "gelu_tanh")}
    if architecture == GPT2:
        return TransformerConfig(
            **common,
            ffn_hidden_size=theirs.n_inner or 4 * theirs.n_embd,
            position_embedding="learned",
            norm_epsilon=theirs.layer_norm_epsilon,
            activation=names[theirs.activation_function],  # type: ignore[arg-type]
            qkv_bias=True,
            attention_output_bias=True,
            attention_dropout=theirs.attn_pdrop,
            hidden_dropout=theirs.resid_pdrop,
        )
    rope = theirs.rope_parameters
    return TransformerConfig(
        **common,
        ffn_hidden_size=theirs.intermediate_size,
        rope=RopeConfig(
            theta=rope["rope_theta"],
            type=rope["rope_type"],
            factor=rope.get("factor", 1.0),
            partial_factor=rope["partial_rotary_factor"],
        ),
        norm_epsilon=theirs.layer_norm_eps,
        activation=names[theirs.hidden_act],  # type: ignore[arg-type]
        qkv_bias=theirs.attention_bias,
        attention_output_bias=theirs.attention_bias,
        parallel_residual=theirs.use_parallel_residual,
        attention_dropout=theirs.attention_dropout,
        hidden_dropout=theirs.hidden_dropout,
    )


MORE: list[tuple[str, dict[str, Any]]] = [
    (GPT2, {}),
    (GPT2, {"layer_norm_epsilon": 3e-5, "initializer_range": 0.03, "n_inner": 50}),
    (GPT2, {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
    # As OpenAI's own config.json, which says nothing of a head.
    (GPT2, {"n_ctx": 99, "summary_type": "cls_index", "task_specific_params": {}}),
    (NEOX, {}),
    (NEOX, {"attention_dropout": 0.3, "hidden_dropout": 0.2, "layer_norm_eps": 3e-5}),
    # As Pythia's config.json, written by transformers 4.
    (NEOX, {"rotary_pct": 0.5, "rotary_emb_base": 5000, "max_position_embeddings": 99}),
    # rope_parameters wins where both are there, and each fills what the other leaves out.
    (
        NEOX,
        {
            "rotary_pct": 0.5,
            "rotary_emb_base": 5000,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        },
    ),
    (NEOX, {"rotary_pct": 1.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
]


@pytest.mark.parametrize(
    ("architecture", "more"), [*GPT.values(), *MORE], ids=lambda value: str(value)[:60]
)
def test_every_field_says_what_transformers_reads(
    tmp_path: Path, architecture: str, more: dict[str, Any]
) -> None:
    given = entries(architecture, **more)
    ours = to_native(given)
    assert ours == said(read_by_transformers(tmp_path, given), architecture)
    back = to_hf(ours, architecture)
    assert to_native(back) == ours
    assert said(read_by_transformers(tmp_path, back), architecture) == ours


def test_an_export_keeps_what_it_does_not_know_and_speaks_both_spellings(tmp_path: Path) -> None:
    """A file of transformers 5, from which transformers 4 would take its defaults."""
    rope = {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5}
    source = entries(NEOX, rope_parameters={**rope, "note": 1}, hidden_act="gelu_fast", extra=[3])
    before = to_hf(to_native(source), NEOX)
    merged = merge_config(source, before, before)
    assert {key: merged[key] for key in source} == source
    assert (merged["rotary_pct"], merged["rotary_emb_base"]) == (0.5, 700.0)
    assert merged.keys() - source.keys() == {"rotary_pct", "rotary_emb_base", "rope_scaling"}
    changed = replace(to_native(source), rope=RopeConfig(theta=800.0, partial_factor=0.25))
    merged = merge_config(source, before, to_hf(changed, NEOX))
    assert (merged["rotary_pct"], merged["rotary_emb_base"]) == (0.25, 800.0)
    assert merged["rope_parameters"]["rope_theta"] == 800.0
    assert to_native(merged) == changed


@pytest.mark.parametrize(
    ("architecture", "more", "words"),
    [
        ("GPTJForCausalLM", {}, "GPTJForCausalLM"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights False, and only True"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention True, and only False"),
        (GPT2, {"activation_function": "mish"}, "activation_function 'mish'"),
        (GPT2, {"n_embd": None}, "no n_embd"),
        (NEOX, {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        (NEOX, {"intermediate_size": "48"}, "intermediate_size '48', which is no whole number"),
        (NEOX, {"rotary_pct": "a"}, "partial_rotary_factor 'a', which is no number"),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    architecture: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConversionError, match=words):
        to_native({"architectures": [architecture], **SIZES.get(architecture, {}), **more})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7"),
        ({"rotary_pct": 0.0}, "rope.partial_factor is 0.0"),
        ({"rotary_pct": 0.2}, "rotates 1 dimensions"),
    ],
)
def test_impossible_numbers_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        to_native(entries(NEOX, **more))


@pytest.mark.parametrize("preset", FAMILIES["gpt"].presets())
def test_every_preset_can_be_exported_and_read_again(preset: str) -> None:
    config = canonical(FAMILIES["gpt"].presets()[preset]())
    architecture = NEOX if config.position_embedding == "rope" else GPT2
    found = to_native(to_hf(config, architecture))
    assert not differing_fields(config, found, ("scale_output_init",))
    other = GPT2 if architecture == NEOX else NEOX
    assert differing_fields(config, to_native(to_hf(config, other)), FAMILY.incidental)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    config = replace(to_native(entries(NEOX)), hidden_size=50)
    with pytest.raises(ConversionError, match="these are 50 and 8"):
        to_hf(config, NEOX)


def test_registry_and_table_name_the_same_classes() -> None:
    assert FAMILIES["gpt"].architectures == FAMILY.architectures == tuple(CLASSES)
