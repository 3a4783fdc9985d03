"""Which backend a configuration asks for."""

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.backends.transformer_engine import (
    TransformerEngineSpecProvider,
    require_transformer_engine,
)
from core.config.backend import SPLIT_SCHEDULES, Backend
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig, bf16_layers
from core.layers.fp8_products import Fp8Products


def chosen_backend(
    backend: Backend, precision: PrecisionConfig, parallel: ParallelConfig, num_layers: int
) -> BackendSpecProvider:
    """What supplies the parts of a model of `num_layers` layers.

    Raises:
        ConfigError: the backend is not installed.
    """
    if backend == "local":
        if precision.fp8 == "none":
            return LocalSpecProvider()
        recipe = Fp8Products(by_row=precision.fp8 == "rowwise")
        return LocalSpecProvider(recipe, bf16_layers(precision, num_layers))
    require_transformer_engine()
    assert precision.fp8 != "rowwise", "refused by the rules of core.config.backend"
    return TransformerEngineSpecProvider(
        num_layers,
        precision.fp8,
        precision.fp8_bf16_first_layers,
        precision.fp8_bf16_last_layers,
        split_backward=parallel.schedule in SPLIT_SCHEDULES,
    )
