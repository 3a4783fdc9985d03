"""Rotary position embedding (Su et al., 2021) and its extensions to longer contexts.

Frequencies are computed in fp32, as Hugging Face does, so that a converted model sees the same
angles.
"""

import math

import torch
from torch import Tensor

from core.config.transformer import RopeConfig


def _plain(rope: RopeConfig, size: int) -> Tensor:
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / (rope.theta**exponents)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between interpolated (Llama 3.1
    report).
    """
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = torch.where(wavelength > context / low, plain / rope.factor, plain)
    middle = (wavelength <= context / low) & (wavelength >= context / high)
    return torch.where(middle, between, stretched)


def _yarn(rope: RopeConfig, plain: Tensor, size: int) -> Tensor:
    """Frequencies with few rotations in the original context are stretched (Peng et al., "YaRN",
    2023).
    """
    assert rope.original_max_position_embeddings is not None
    context = rope.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = (high - low) or 0.001  # equal ends would divide by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of every pair of dimensions: fp32 `[r / 2]`, r the rotated part of the
    head.
    """
    size = int(head_dim * rope.partial_factor)
    plain = _plain(rope, size)
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, plain)
    if rope.type == "yarn":
        return _yarn(rope, plain, size)
    return plain


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 but for yarn."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


class RotaryEmbedding:
    """cos and sin for positions 0 to s - 1. Holds no parameter and nothing that a checkpoint
    needs.
    """

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._factor = attention_factor(rope)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions 0 to `length` - 1: two fp32 tensors `[length, r]`."""
        if device not in self._tables or self._tables[device][0].shape[0] < length:
            # Ordinary tensors even if generation comes first: autograd refuses inference tensors.
            with torch.inference_mode(False):
                positions = torch.arange(length, dtype=torch.float32)
                angles = torch.outer(positions, self._frequencies)
                angles = torch.cat((angles, angles), dim=-1)
                cos, sin = angles.cos() * self._factor, angles.sin() * self._factor
                self._tables[device] = cos.to(device), sin.to(device)
        cos, sin = self._tables[device]
        return cos[:length], sin[:length]

    def at(
        self, positions: Tensor | None, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rows of the tables for int64 positions `[b, s]`, all below `length`: two fp32 tensors
        `[s, b, r]`; without positions those of 0 to `length` - 1, `[length, r]`.
        """
        cos, sin = self(length, device)
        if positions is None:
            return cos, sin
        rows = positions.t()
        return cos[rows], sin[rows]
