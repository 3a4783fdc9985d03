import inspect
from typing import get_args

import pytest
from torch import nn

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider, NormKind
from core.layers.norm import LayerNorm, RMSNorm
from core.layers.products import Fp8Products
from core.spec import ModuleSpec


def _calls(provider: BackendSpecProvider) -> dict[str, object]:
    """What every method of the protocol that supplies a part returns, `norm` for every kind."""
    calls: dict[str, object] = {}
    for name, method in inspect.getmembers(BackendSpecProvider, inspect.isfunction):
        if name.startswith("_") or name == "for_layer":
            continue
        if list(inspect.signature(method).parameters) == ["self"]:
            calls[name] = getattr(provider, name)()
            continue
        for kind in get_args(NormKind):
            calls[f"{name} {kind}"] = getattr(provider, name)(kind)
    return calls


def test_every_method_returns_the_spec_of_a_module() -> None:
    calls = _calls(LocalSpecProvider().for_layer(0))
    assert len(calls) >= 5
    for name, found in calls.items():
        assert isinstance(found, ModuleSpec), name
        assert issubclass(found.module, nn.Module), name


def test_offers_nothing_that_the_protocol_does_not_know() -> None:
    def methods(cls: type) -> dict[str, object]:
        found = inspect.getmembers(cls, inspect.isfunction)
        return {n: list(inspect.signature(m).parameters) for n, m in found if n[0] != "_"}

    assert methods(LocalSpecProvider) == methods(BackendSpecProvider)


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
