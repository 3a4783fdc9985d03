"""The specs of one GPT layer by backend. Both are written once, in `core.transformer.decoder`: they
differ in who supplies the parts, and in nothing else.
"""

from typing import Any

from core.backends.local import LocalSpecProvider
from core.config.transformer import TransformerConfig
from core.spec import ModuleSpec
from core.transformer.decoder import decoder_layer_spec


def get_gpt_layer_local_spec(config: TransformerConfig, layer: int) -> ModuleSpec[Any]:
    """Layer `layer`, counted over the whole model, of parts that need only torch."""
    return decoder_layer_spec(config, LocalSpecProvider(), layer)


def get_gpt_layer_with_transformer_engine_spec(
    config: TransformerConfig, layer: int
) -> ModuleSpec[Any]:
    """Layer `layer`, counted over the whole model, of parts that NVIDIA's Transformer Engine
    supplies.
    """
    # Only whoever asks for it needs the library.
    from core.backends.transformer_engine import TransformerEngineSpecProvider

    return decoder_layer_spec(config, TransformerEngineSpecProvider(config.num_layers), layer)
