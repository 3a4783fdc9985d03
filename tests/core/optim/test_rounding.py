import pytest
import torch
from torch import Tensor

from core.optim.rounding import join_master, round_master, round_stochastic, split_master

EDGES = [
    0x00000000,  # zero
    0x00000001,  # least subnormal
    0x00007FFF,
    0x00008000,  # tie of subnormals
    0x007FFFFF,  # greatest subnormal
    0x00800000,  # least normal
    0x3F800000,  # one
    0x3F807FFF,  # just below a tie
    0x3F808000,  # tie, even below
    0x3F808001,
    0x3F818000,  # tie, odd below
    0x3FFF8000,  # rounds to the next power of two
    0x7F7F0000,  # greatest bf16
    0x7F7F7FFF,
    0x7F7F8000,  # rounds to infinity
    0x7F7FFFFF,  # greatest fp32
    0x7F800000,  # infinity
]


def _floats(bits: Tensor) -> Tensor:
    """int64 bit patterns as fp32."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)


def _masters() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor(EDGES)
    # All fractions for a few exponents, both signs; and any pattern.
    low = torch.arange(1 << 16)
    rows = [low + (upper << 16) for upper in (0x0000, 0x0080, 0x3F80, 0x3F81, 0x7F7F, 0x4237)]
    dense = torch.cat([edges, *rows])
    anything = torch.randint(1 << 32, (1 << 20,), generator=generator)
    masters = _floats(torch.cat([dense, dense | 1 << 31, anything]))
    return masters[~masters.isnan()]


def test_splitting_loses_no_bit() -> None:
    masters = _masters()
    assert masters.isinf().any()
    values, remainder = split_master(masters)
    assert (values.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_master(values, remainder).view(torch.int32), masters.view(torch.int32))


def test_every_pair_of_halves_is_some_master() -> None:
    """2^16 masters for every bf16 number: the other direction of the bijection."""
    remainder = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for upper in (0x0001, 0x3F80, 0x7F7F, 0x8001, 0xBF80, 0xFF7F):
        value = torch.full((1 << 16,), upper, dtype=torch.int32).to(torch.int16)
        joined = join_master(value.view(torch.bfloat16), remainder)
        assert len(joined.view(torch.int32).unique()) == 1 << 16
        again, rest = split_master(joined)
        assert torch.equal(again.view(torch.int16), value)
        assert torch.equal(rest, remainder)


def test_zeros_keep_their_sign() -> None:
    values, remainder = split_master(torch.tensor([0.0, -0.0]))
    assert values.signbit().tolist() == [False, True]
    assert join_master(values, remainder).signbit().tolist() == [False, True]


def test_parameters_are_the_nearest_bf16_and_ties_go_away_from_zero() -> None:
    masters = _masters()
    values = split_master(masters)[0]
    nearest = masters.bfloat16()  # ties to even
    tie = (masters.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(values[~tie], nearest[~tie])
    assert torch.all(values[tie].abs() >= masters[tie].abs())
    finite = tie & values.isfinite()
    error = (values[finite].double() - masters[finite].double()).abs()
    other = (nearest[finite].double() - masters[finite].double()).abs()
    assert torch.equal(error, other)
    assert torch.equal(round_master(masters, torch.bfloat16), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_formats_are_rounded_by_torch(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(round_master(x, dtype), x.to(dtype))


NUMBERS = [1.0, 1.001, -1.001, 3.14159, -2.7e-12, 6.02e23, 1e-40, -1e-45, 0.0, -0.0, 1.99999, 0.1]


@pytest.mark.parametrize("number", NUMBERS)
def test_stochastic_rounding_is_exact_in_expectation(number: float) -> None:
    """Over all random bits: the mean is the number itself, and only neighbours occur."""
    x = torch.full((1 << 16,), number)
    bits = torch.arange(1 << 16) + (0xABCD << 16)  # the upper bits are not looked at
    rounded = round_stochastic(x, bits)
    assert rounded.dtype == torch.bfloat16
    assert float(rounded.double().mean()) == float(x[0].double())
    below = (x[0].view(torch.int32) >> 16).to(torch.int16)
    neighbours = (
        {int(below), int(below) + 1} if int(x[0].view(torch.int32)) & 0xFFFF else {int(below)}
    )
    assert set(rounded.view(torch.int16).tolist()) == neighbours


def test_stochastic_rounding_of_random_bits_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, generator=generator)
    draws = 4000
    bits = torch.randint(1 << 32, (draws, 500), generator=generator)
    rounded = round_stochastic(x.expand(draws, -1).contiguous(), bits).double()
    low = rounded.min(0).values
    step = rounded.max(0).values - low
    up = (x.double() - low) / step
    sigma = step * (up * (1 - up) / draws).sqrt()
    off = (rounded.mean(0) - x.double()).abs() / sigma
    assert float(off.max()) < 4.0
