"""Which backend a configuration asks for."""

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.config.precision import PrecisionConfig


def chosen_backend(precision: PrecisionConfig, num_layers: int) -> BackendSpecProvider:
    """What supplies the parts of a model of `num_layers` layers."""
    return LocalSpecProvider()
