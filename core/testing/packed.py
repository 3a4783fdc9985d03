"""Objects with many small tensors as bytes. Torch's own pickling takes a fifth of a millisecond a
tensor, which adds up when whole models pass between processes of a test.
"""

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """CPU tensors by their bytes; whatever else as always."""
        if type(obj) is not Tensor or obj.device.type != "cpu":
            return NotImplemented
        values = obj.detach().contiguous().view(-1).view(torch.uint8)
        return _tensor, (values.numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _tensor(values: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not values:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=dtype).view(shape)


def packed(thing: Any) -> bytes:
    """Anything that can be pickled; `pickle.loads` gives it back. Tensors lose their graph."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(thing)
    return buffer.getvalue()
