"""The GPT family's model: the plain decoder. What sets GPT-2, GPT-3 and GPT-NeoX apart (learned or
rotary positions, branches one after the other or side by side) is said by the config.
"""

from core.transformer.decoder import build_decoder as build_gpt

__all__ = ["build_gpt"]
