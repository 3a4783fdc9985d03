"""Which backend a configuration asks for."""

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.config.precision import PrecisionConfig, bf16_layers
from core.layers.products import Fp8Products


def chosen_backend(precision: PrecisionConfig, num_layers: int) -> BackendSpecProvider:
    """What supplies the parts of a model of `num_layers` layers."""
    if precision.fp8 == "none":
        return LocalSpecProvider()
    recipe = Fp8Products(by_row=precision.fp8 == "rowwise")
    return LocalSpecProvider(recipe, bf16_layers(precision, num_layers))
