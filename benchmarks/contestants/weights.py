"""The weights that all contestants start from: ours, under their global names."""

import torch
from torch import Tensor

from benchmarks.contestants.registry import SEED
from converters.rules import Family
from core.config.transformer import TransformerConfig
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.sharding import declared_parameters
from models.registry import family_for_preset


def conversion_of(preset: str) -> Family:
    """The mapping of a preset's family from and to Hugging Face."""
    family: Family = family_for_preset(preset).load("convert").FAMILY
    return family


def initial_weights(
    family: Family, config: TransformerConfig, device: torch.device
) -> dict[str, Tensor]:
    """Every parameter by its global name, bf16, as ours has it on one process before the first
    step: numbers are random by name and place, so a second model gets the same ones.
    """
    context = ParallelContext.single(device)
    model = family.build_model(config, Placement(context, torch.bfloat16, device))
    declared = declared_parameters(model)
    initialize_parameters(declared, SEED)
    found = {}
    for name, parameter in declared.items():
        # One process: boxes lie where they lie in the whole. Rows after them pad a vocabulary.
        assert all(copy.local == copy.global_ for copy in parameter.sharding.copies)
        found[name] = parameter.local[: parameter.sharding.global_shape[0]]
    return found
