"""The decoder-only model that most families are, composed from what the config says."""

from typing import Any

from torch import nn

from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.config.parallel import RecomputeConfig
from core.config.transformer import TransformerConfig
from core.layers.attention import SelfAttention, SelfAttentionSubmodules
from core.layers.mlp import MLP, MLPSubmodules
from core.parallel.placement import Placement
from core.spec import IDENTITY, ModuleSpec
from core.transformer.language_model import LanguageModel
from core.transformer.layer import TransformerLayer, TransformerLayerSubmodules
from core.transformer.parallel_layer import ParallelResidualLayer, ParallelResidualLayerSubmodules


def decoder_layer_spec(
    config: TransformerConfig, backend: BackendSpecProvider, layer: int
) -> ModuleSpec[Any]:
    """Layer `layer`, counted over the whole model: causal self-attention and an MLP, each after a
    norm; one after the other, or side by side (`parallel_residual`).
    """
    backend = backend.for_layer(layer)
    norm = backend.norm(config.normalization)
    head_norm: ModuleSpec[nn.Module] = IDENTITY
    if config.qk_norm != "none":
        head_norm = backend.norm(config.qk_norm)
    attention: ModuleSpec[Any] = ModuleSpec(
        SelfAttention,
        params={"causal": True, "window": config.window_of(layer)},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_norm=head_norm,
            k_norm=head_norm,
        ),
    )
    mlp: ModuleSpec[Any] = ModuleSpec(
        MLP,
        submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            linear_fc2=backend.row_parallel_linear(),
        ),
    )
    if config.parallel_residual:
        return ModuleSpec(
            ParallelResidualLayer,
            submodules=ParallelResidualLayerSubmodules(
                input_norm=norm, self_attention=attention, pre_mlp_norm=norm, mlp=mlp
            ),
        )
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_norm=norm, self_attention=attention, pre_mlp_norm=norm, mlp=mlp
        ),
    )


def build_decoder(
    config: TransformerConfig,
    place: Placement,
    recompute: RecomputeConfig | None = None,
    backend: BackendSpecProvider | None = None,
) -> LanguageModel:
    """The model, or the parts of it that `place` holds; parameters are not yet initialised.

    Args:
        config: architecture.
        place: axes, format, device and parts.
        recompute: which activations are recomputed; none by default.
        backend: what supplies the layers' parts; `local` by default.

    Raises:
        ConfigError: heads cannot be divided over tp.
    """
    backend = backend or LocalSpecProvider()
    return LanguageModel(
        config,
        place,
        layers={i: decoder_layer_spec(config, backend, i) for i in range(config.num_layers)},
        final_norm=backend.norm(config.normalization),
        recompute=recompute,
    )
