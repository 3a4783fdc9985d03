"""Tiny random models of `transformers`, saved as folders, for conversion and parity tests.

Nothing is at its default: initial biases of 0 and norms of 1 would hide a tensor that is lost or
exchanged. Head counts and widths do not divide alike, and the vocabulary divides by nothing.
"""

import re
from pathlib import Path
from typing import Any

import torch

LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "mistral_full": ("MistralForCausalLM", {"sliding_window": None, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "qwen3_yarn": (
        "Qwen3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
            },
        },
    ),
}
"""Variants of the Llama family: name to Hugging Face class and the config entries that set it
apart."""

GPT: dict[str, tuple[str, dict[str, Any]]] = {
    # The MLP is as wide as the model: all weights but c_attn are square, so that a transpose too
    # many or too few shows in no shape.
    "gpt2": ("GPT2LMHeadModel", {"n_inner": 48}),
    "gpt2_untied": (
        "GPT2LMHeadModel",
        {"tie_word_embeddings": False, "activation_function": "gelu"},
    ),
    "neox": ("GPTNeoXForCausalLM", {}),
    "neox_serial": (
        "GPTNeoXForCausalLM",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_fast",
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 3000.0,
                "factor": 4.0,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
}
"""Likewise of the GPT family."""

VARIANTS = {**LLAMA, **GPT}
"""All of them."""

_LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0},
}
_SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "n_embd": 48,
        "n_inner": 56,
        "n_layer": 3,
        "n_head": 8,
        "n_positions": 128,
        "layer_norm_epsilon": 3e-5,
    },
    "GPTNeoXForCausalLM": {
        "hidden_size": 64,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "max_position_embeddings": 128,
        "layer_norm_eps": 3e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 2000.0,
            "partial_rotary_factor": 0.5,
        },
    },
}
"""Sizes by class, where they are not those of the Llama family."""


def tiny_hf_model(variant: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A model of `transformers` in evaluation mode, every parameter random.

    Args:
        variant: key of `VARIANTS`.
        seed: of the parameters.
        **overrides: entries of its config.
    """
    import transformers

    name, entries = VARIANTS[variant]
    model_class = getattr(transformers, name)
    sizes = {
        "vocab_size": 67,
        "initializer_range": 0.03,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **_SIZES.get(name, _LLAMA_SIZES),
    }
    config = model_class.config_class(**{**sizes, **entries, **overrides})
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if re.search(r"norm|\bln_", key):
                # Near 1 for weights; a bias is as far from 0.
                parameter.copy_(("weight" in key) + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if parameter.dim() == 1 else 0.15))
    return model


def save_hf_model(
    folder: Path,
    variant: str,
    *,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a tiny model as `transformers` does; a small `shard_size` gives several files."""
    model = tiny_hf_model(variant, **overrides).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder
