import pytest

from core.backends.local import LocalSpecProvider
from core.layers.fp8_products import Fp8Products
from core.layers.norm import LayerNorm, RMSNorm


def test_norms() -> None:
    assert LocalSpecProvider().norm("rmsnorm").module is RMSNorm
    assert LocalSpecProvider().norm("layernorm").module is LayerNorm
    with pytest.raises(KeyError):
        LocalSpecProvider().norm("batchnorm")  # type: ignore[arg-type]


def test_fp8_is_for_linear_layers_of_the_layers_chosen() -> None:
    recipe = Fp8Products()
    provider = LocalSpecProvider(recipe, frozenset({0, 3}))
    for layer in range(4):
        one = provider.for_layer(layer)
        expected = {} if layer in (0, 3) else {"products": recipe}
        assert one.column_parallel_linear().params == expected
        assert one.row_parallel_linear().params == expected
        assert one.norm("rmsnorm").params == one.core_attention().params == {}


def test_norms_stand_by_themselves() -> None:
    assert LocalSpecProvider().layernorm_column_parallel_linear("rmsnorm", 1e-5, "norm") is None
