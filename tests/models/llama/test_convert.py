"""config.json field by field: against `transformers`' own reading of the same file, and back."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from converters.hf_config import differing_fields
from core.config.transformer import RopeConfig, TransformerConfig, canonical
from core.errors import ConfigError, ConversionError
from core.testing.hf_models import LLAMA
from models.llama.convert import CLASSES, FAMILY, to_hf, to_native
from models.registry import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}


def entries(architecture: str, **more: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SIZES, **more}


@pytest.mark.parametrize("variant", LLAMA)
def test_every_field_says_what_transformers_reads(tmp_path: Path, variant: str) -> None:
    import transformers

    name, special = LLAMA[variant]
    given = entries(
        name,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=99,
        rms_norm_eps=3e-5,
        initializer_range=0.03,
        attention_dropout=0.25,
        **special,
    )
    given["model_type"] = CLASSES[name].model_type
    (tmp_path / "config.json").write_text(json.dumps(given))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = to_native(given)
    rope = theirs.rope_parameters
    biases = {"Qwen2ForCausalLM": (True, False), "MistralForCausalLM": (False, False)}
    option = bool(getattr(theirs, "attention_bias", False))
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 3
    window = getattr(theirs, "sliding_window", None)
    layers = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    assert ours == TransformerConfig(
        num_layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        num_attention_heads=theirs.num_attention_heads,
        num_query_groups=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        ffn_hidden_size=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_position_embeddings=theirs.max_position_embeddings,
        rope=RopeConfig(
            theta=rope["rope_theta"],
            **{k.removeprefix("rope_"): v for k, v in rope.items() if k != "rope_theta"},
        ),
        norm_epsilon=theirs.rms_norm_eps,
        activation=theirs.hidden_act,
        qkv_bias=biases.get(name, (option, option))[0],
        attention_output_bias=biases.get(name, (option, option))[1],
        mlp_bias=bool(getattr(theirs, "mlp_bias", False)),
        qk_norm="rmsnorm" if "Qwen3" in name else "none",
        sliding_window=window,
        sliding_window_layers=layers if window and len(layers) < 3 else None,
        tie_embeddings=theirs.tie_word_embeddings,
        attention_dropout=theirs.attention_dropout,
        init_std=theirs.initializer_range,
    )
    # And back, losing nothing that a class can say.
    back = to_hf(ours, name)
    assert {key: back[key] for key in given if key not in ("rope_parameters", "layer_types")} == {
        key: value for key, value in given.items() if key not in ("rope_parameters", "layer_types")
    }
    assert to_native(back) == ours


@pytest.mark.parametrize("architecture", CLASSES)
def test_keys_that_are_left_out_have_the_class_defaults(architecture: str) -> None:
    import transformers

    sizes = {**SIZES, "num_attention_heads": 32, "hidden_size": 64}
    theirs = getattr(transformers, architecture).config_class(**sizes)
    ours = to_native({"architectures": [architecture], **sizes})
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.kv_channels == getattr(theirs, "head_dim", 2)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.norm_epsilon == theirs.rms_norm_eps
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.init_std == theirs.initializer_range
    assert ours.activation == theirs.hidden_act


def test_null_is_not_left_out() -> None:
    mistral = to_native(
        entries("MistralForCausalLM", num_key_value_heads=None, head_dim=None, sliding_window=None)
    )
    assert (mistral.kv_heads, mistral.kv_channels, mistral.sliding_window) == (8, 6, None)


@pytest.mark.parametrize(
    ("more", "window", "layers"),
    [
        ({"use_sliding_window": False, "sliding_window": 5}, None, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}, None, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, 5, (1, 2)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 0,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            5,
            (0, 2),
        ),
    ],
)
def test_windows_of_qwen2(
    more: dict[str, Any], window: int | None, layers: tuple[int, ...] | None
) -> None:
    config = to_native(entries("Qwen2ForCausalLM", num_key_value_heads=2, **more))
    assert (config.sliding_window, config.sliding_window_layers) == (window, layers)
    assert to_native(to_hf(config, "Qwen2ForCausalLM")) == config


@pytest.mark.parametrize(
    ("architecture", "more", "words"),
    [
        ("GemmaForCausalLM", {}, "GemmaForCausalLM"),
        ("LlamaForCausalLM", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("LlamaForCausalLM", {"hidden_size": None}, "no hidden_size"),
        ("Qwen3ForCausalLM", {"rope_scaling": {"type": "su"}}, "rope_type 'su'"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    architecture: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConversionError, match=words):
        to_native(
            entries(architecture, **{"num_key_value_heads": 2, "use_sliding_window": True, **more})
        )


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_query_groups 3"):
        to_native(entries("LlamaForCausalLM", num_key_value_heads=3))


@pytest.mark.parametrize("preset", FAMILIES["llama"].presets())
def test_every_preset_can_be_exported_and_read_again(preset: str) -> None:
    config = canonical(FAMILIES["llama"].presets()[preset]())
    for architecture in FAMILY.architectures:
        found = to_native(to_hf(config, architecture))
        if not differing_fields(config, found, FAMILY.incidental):
            break
    else:
        pytest.fail(f"no class can say {preset}")


def test_registry_and_table_name_the_same_classes() -> None:
    assert FAMILIES["llama"].architectures == FAMILY.architectures == tuple(CLASSES)


def test_incidental_fields_exist() -> None:
    assert set(FAMILY.incidental) <= {field.name for field in fields(TransformerConfig)}


def test_canonical_writes_defaults_out() -> None:
    config = to_native(entries("LlamaForCausalLM", num_key_value_heads=None))
    short = replace(config, num_query_groups=None, head_dim=None)
    assert short != config
    assert canonical(short) == canonical(config) == config
    all_layers = replace(config, sliding_window=4, sliding_window_layers=(0, 1, 2))
    assert canonical(all_layers) == replace(config, sliding_window=4)
