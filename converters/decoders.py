"""What the converters of all plain decoders share (`core.transformer.decoder`). Imports torch where
it is needed only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.rules import Family
from core.config.transformer import TransformerConfig, validate_layout

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core.parallel.placement import Placement
    from core.parallel.sharding import DeclaredParameter
    from core.training.language_model_task import ImportWeights


def build_decoder_model(config: TransformerConfig, place: "Placement") -> "nn.Module":
    """The model, its parameters not yet initialised.

    Raises:
        ConfigError: it cannot be cut over tp.
    """
    from core.transformer.decoder import build_decoder

    validate_layout(config, place.ctx.tp.size, sequence_parallel=False, seq_length=1)
    return build_decoder(config, place)


def decoder_logits(model: "nn.Module", tokens: "Tensor") -> "Tensor":
    """Logits `[b, s, vocab]` of tokens `[b, s]`."""
    from core.transformer.language_model import LanguageModel

    assert isinstance(model, LanguageModel)
    return model.logits(tokens)


def importer(family: Family) -> "ImportWeights":
    """What fills a rank's live parameters from a Hugging Face folder (`--init-from`). It raises
    ConversionError where the folder cannot be read, or holds another model than is expected.
    """

    def import_weights(
        source: Path, config: TransformerConfig, parameters: "Mapping[str, DeclaredParameter]"
    ) -> Mapping[str, Any]:
        from converters.source import load_into, open_source

        return load_into(parameters, open_source(source, family), config)

    return import_weights
