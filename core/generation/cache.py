"""Keys and values of the tokens read so far, kept for the ones to come.

Legend: s tokens of one pass, z slots in use, b batch, g key and value heads of this rank, d head
size.
"""

import torch
from torch import Tensor

from core.kernels.masked_attention import QueryPositions


class KeyValueCache:
    """What self-attention keeps of a batch whose rows may have different lengths.

    A row's token at position p lies in slot p. So rows are aligned on the left, and whatever stands
    in a slot after a row's last token, such as padding of a prompt, is overwritten before a query
    can see it. Layers are told apart by their global names; memory is taken at their first pass.
    """

    def __init__(self, capacity: int) -> None:
        """Make an empty cache.

        Args:
            capacity: slots, as many as the longest row will have tokens.
        """
        self.capacity = capacity
        self.positions: Tensor | None = None
        """int64 `[b, s]`: of the tokens that the next pass reads; None: 0 to s - 1 in every row,
        with nothing before them."""
        self.end = 0
        """Slots in use when that pass is over; every position is below it."""
        self._layers: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(self, end: int, positions: Tensor | None = None) -> None:
        """Say what the next pass of the model reads: see the two attributes.

        Raises:
            ValueError: more than fits in.
        """
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache of {self.capacity}")
        self.end, self.positions = end, positions

    def extend(
        self, layer: str, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, QueryPositions | None]:
        """Keep a pass's keys and values, `[s, b, g, d]`, of one layer.

        Returns:
            All keys and values, `[z, b, g, d]`, and where the queries stand among them; None if
            nothing came before, so that the layer's own pattern says all.
        """
        s, b = k.shape[:2]
        if self.positions is None:
            kept = tuple(x.new_zeros((b, self.capacity, *x.shape[2:])) for x in (k, v))
            self._layers[layer] = (kept[0], kept[1])
            for whole, new in zip(kept, (k, v), strict=True):
                whole[:, :s] = new.transpose(0, 1)
            return k, v, None
        rows = torch.arange(b, device=k.device)[:, None]
        for whole, new in zip(self._layers[layer], (k, v), strict=True):
            whole[rows, self.positions] = new.transpose(0, 1)
        keys, values = (whole[:, : self.end].transpose(0, 1) for whole in self._layers[layer])
        return keys, values, QueryPositions(self.positions)
