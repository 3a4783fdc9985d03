"""How the rows of a tensor lie in memory, for hand-written kernels of which one program takes one
token.
"""

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Tokens at equal distances, each of which has its heads side by side."""

    tokens: int
    stride: int
    """From token to token, in elements: heads may be a part of a fused projection."""
    heads: int
    """1 for a hidden state."""
    width: int
    """Of a head, or of the hidden state."""


def heads_of(x: Tensor) -> int:
    """Of `[s, b, n, d]` the third dimension, and 1 for anything with fewer."""
    return x.shape[-2] if x.dim() >= 4 else 1


def token_rows(x: Tensor) -> tuple[Tensor, TokenRows]:
    """The same tensor, copied only if its tokens do not lie like that, and how they lie.

    Args:
        x: `[..., h]` of fewer than four dimensions, or `[s, b, n, d]`.
    """
    heads, width = heads_of(x), x.shape[-1]
    tokens = x.numel() // (heads * width) if x.numel() else 0
    own = 2 if x.dim() >= 4 else 1
    steps = x.stride()[-own:]
    dense = steps[-1] == 1 and (heads == 1 or steps[0] == width)
    leading = [pair for pair in zip(x.shape[:-own], x.stride()[:-own], strict=True) if pair[0] > 1]
    even = all(far == near * size for (_, far), (size, near) in pairwise(leading))
    if dense and even and leading:
        return x, TokenRows(tokens, leading[-1][1], heads, width)
    return x.contiguous(), TokenRows(tokens, heads * width, heads, width)
