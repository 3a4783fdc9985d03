"""Layer specs by the names under which Megatron-LM's users look for them. The model itself is
composed by `core.transformer.decoder`, which is all that these call.
"""

from core.backends.local import LocalSpecProvider
from core.backends.transformer_engine import TransformerEngineSpecProvider
from core.config.transformer import TransformerConfig
from core.spec import ModuleSpec
from core.transformer.decoder import decoder_layer_spec
from core.transformer.layer import TransformerLayer


def get_llama_layer_local_spec(
    config: TransformerConfig, layer: int
) -> ModuleSpec[TransformerLayer]:
    """Layer `layer` of this project's own parts."""
    return decoder_layer_spec(config, LocalSpecProvider(), layer)


def get_llama_layer_with_transformer_engine_spec(
    config: TransformerConfig, layer: int
) -> ModuleSpec[TransformerLayer]:
    """Layer `layer` of Transformer Engine's parts, in 16 bits."""
    return decoder_layer_spec(config, TransformerEngineSpecProvider(config.num_layers), layer)
