import pytest

from core.backends.local import LocalSpecProvider
from core.layers.norm import LayerNorm, RMSNorm


def test_norms() -> None:
    assert LocalSpecProvider().norm("rmsnorm").module is RMSNorm
    assert LocalSpecProvider().norm("layernorm").module is LayerNorm
    with pytest.raises(KeyError):
        LocalSpecProvider().norm("batchnorm")  # type: ignore[arg-type]


def test_norms_stand_by_themselves() -> None:
    assert LocalSpecProvider().layernorm_column_parallel_linear("rmsnorm", 1e-5, "norm") is None
