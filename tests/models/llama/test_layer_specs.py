import dataclasses

from core.backends.local import LocalSpecProvider
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.transformer.decoder import decoder_layer_spec
from models.llama.config import PRESETS
from models.llama.layer_specs import (
    get_llama_layer_local_spec,
    get_llama_layer_with_transformer_engine_spec,
)

CONFIG = dataclasses.replace(
    PRESETS["tiny"](), num_layers=4, sliding_window=16, sliding_window_layers=(1, 3)
)


def test_specs_are_those_that_the_model_is_built_of() -> None:
    engine = TransformerEngineSpecProvider(CONFIG.num_layers)
    for layer in range(CONFIG.num_layers):
        local = get_llama_layer_local_spec(CONFIG, layer)
        assert local == decoder_layer_spec(CONFIG, LocalSpecProvider(), layer)
        fused = get_llama_layer_with_transformer_engine_spec(CONFIG, layer)
        assert fused == decoder_layer_spec(CONFIG, engine, layer)
        assert fused != local
    # A layer's own properties are in its spec.
    assert get_llama_layer_local_spec(CONFIG, 0) != get_llama_layer_local_spec(CONFIG, 1)
