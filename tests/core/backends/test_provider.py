"""Every backend offers what the protocol says."""

import inspect
from collections.abc import Iterator
from typing import get_args

import pytest
from torch import nn

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider, NormKind
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.parallel.context import ParallelContext
from core.spec import ModuleSpec
from core.testing.fake_transformer_engine import installed
from core.transformer.execution import Execution

PROVIDERS: list[BackendSpecProvider] = [LocalSpecProvider(), TransformerEngineSpecProvider(4)]
providers = pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: type(p).__name__)


def _signatures(cls: type) -> dict[str, list[tuple[str, object]]]:
    """Public methods, with names and kinds of their arguments."""
    return {
        name: [(p.name, p.kind) for p in inspect.signature(method).parameters.values()]
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if not name.startswith("_")
    }


@providers
def test_methods_are_those_of_the_protocol(provider: BackendSpecProvider) -> None:
    assert _signatures(type(provider)) == _signatures(BackendSpecProvider)


def _specs(provider: BackendSpecProvider) -> Iterator[tuple[str, object]]:
    yield "column", provider.column_parallel_linear()
    yield "row", provider.row_parallel_linear()
    yield "attention", provider.core_attention()
    for kind in get_args(NormKind):
        yield f"norm {kind}", provider.norm(kind)
        fused = provider.layernorm_column_parallel_linear(kind, 1e-5, "norm")
        if fused is not None:
            yield f"fused {kind}", fused


@providers
def test_parts_are_specs_of_modules(provider: BackendSpecProvider) -> None:
    for name, found in _specs(provider.for_layer(0)):
        assert isinstance(found, ModuleSpec), name
        assert issubclass(found.module, nn.Module), name


@providers
def test_execution_and_description(provider: BackendSpecProvider) -> None:
    assert isinstance(provider.execution(ParallelContext.single()), Execution)
    with installed():
        assert provider.describe().startswith("backend: ")
