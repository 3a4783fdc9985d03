"""Numbers kept in 16 bits: bf16 parameters with the 16 bits that complete them to fp32 masters, and
bf16 moments rounded stochastically. Plain functions, to be called inside compiled ones.

bf16 is the upper half of fp32's bits. Ties are rounded away from zero, not to even: then the number
of masters that round to a parameter is 2^16, so 16 bits can tell them apart. It is also how
parameters with fp32 masters are rounded, so that both ways give the same bits.
"""

import torch
from torch import Tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to the nearest bf16, and the int16 remainder of its bits."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join_master(values: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 numbers that `split_master` split, to the bit."""
    upper = values.view(torch.int16).to(torch.int32)
    return ((upper << 16) + remainder.to(torch.int32)).view(torch.float32)


def round_master(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Masters in the format of their parameters, the way that every update rounds them."""
    if dtype == torch.bfloat16 and master.dtype == torch.float32:
        return split_master(master)[0]
    return master.to(dtype)


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to one of the two bf16 neighbours, in expectation `x` itself.

    Args:
        x: fp32, finite.
        bits: integers of which the low 16 bits are random.
    """
    noise = (bits & 0xFFFF).to(torch.int32)
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
