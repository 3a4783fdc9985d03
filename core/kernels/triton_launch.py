"""How Triton kernels are launched. Imported on CUDA only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton

jit: Callable[[Callable[..., Any]], Any] = triton.jit


@functools.cache
def early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it ends, to wait there for its memory
    with `gdc_wait` (programmatic dependent launch of Hopper and later): about a microsecond less
    between the two.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def early_options(device: torch.device) -> dict[str, bool]:
    """For a launch: an option that only some devices know."""
    return {"launch_pdl": True} if early(device) else {}
