"""The specs that a layer is asked for by name are those that the model is built of."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from core.backends.local import LocalSpecProvider
from core.config.transformer import TransformerConfig
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.spec import build_module
from core.transformer.decoder import decoder_layer_spec
from models.gpt.config import PRESETS
from models.gpt.layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from models.gpt.model import build_gpt

CONFIGS = {
    "gpt2": PRESETS["gpt2"](),
    "neox": PRESETS["pythia-70m"](),
    "windows": replace(PRESETS["gpt2"](), sliding_window=256, sliding_window_layers=(1,)),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_local_spec_builds_the_layer_of_the_model(config: TransformerConfig) -> None:
    place = Placement(ParallelContext.single(), torch.float32, torch.device("meta"))
    model = build_gpt(config, place)
    for layer in (0, 1):
        spec = get_gpt_layer_local_spec(config, layer)
        built = build_module(spec, config, place, name=f"decoder.layers.{layer}")
        own = model.decoder.layers[str(layer)]
        assert repr(built) == repr(own)
        expected = {name: d.sharding for name, d in declared_parameters(own).items()}
        assert {name: d.sharding for name, d in declared_parameters(built).items()} == expected


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_specs_differ_in_the_provider_alone(
    config: TransformerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one provider under the other's name they are equal, layer by layer."""
    asked = []

    def provider(num_layers: int) -> LocalSpecProvider:
        asked.append(num_layers)
        return LocalSpecProvider()

    module = ModuleType("core.backends.transformer_engine")
    module.TransformerEngineSpecProvider = provider  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for layer in (0, 1):
        found = get_gpt_layer_with_transformer_engine_spec(config, layer)
        assert found == get_gpt_layer_local_spec(config, layer)
        assert found == decoder_layer_spec(config, LocalSpecProvider(), layer)
    assert asked == [config.num_layers] * 2
