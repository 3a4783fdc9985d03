"""The Llama family's model: the plain decoder. Llama, Mistral, Qwen2 and Qwen3 differ only in what
the config says of biases, query norms and windows.
"""

from core.transformer.decoder import build_decoder as build_llama

__all__ = ["build_llama"]
