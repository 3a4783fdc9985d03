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
    name = f"decoder.layers.{layer}"
    input_norm, linear_qkv = _normed_linear(config, backend, f"{name}.input_norm")
    pre_mlp_norm, linear_fc1 = _normed_linear(config, backend, f"{name}.pre_mlp_norm")
    head_norm: ModuleSpec[nn.Module] = IDENTITY
    if config.qk_norm != "none":
        head_norm = backend.norm(config.qk_norm)
    attention: ModuleSpec[Any] = ModuleSpec(
        SelfAttention,
        params={"causal": True, "window": config.window_of(layer)},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_norm=head_norm,
            k_norm=head_norm,
        ),
    )
    mlp: ModuleSpec[Any] = ModuleSpec(
        MLP,
        submodules=MLPSubmodules(linear_fc1=linear_fc1, linear_fc2=backend.row_parallel_linear()),
    )
    if config.parallel_residual:
        return ModuleSpec(
            ParallelResidualLayer,
            submodules=ParallelResidualLayerSubmodules(
                input_norm=input_norm, self_attention=attention, pre_mlp_norm=pre_mlp_norm, mlp=mlp
            ),
        )
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_norm=input_norm, self_attention=attention, pre_mlp_norm=pre_mlp_norm, mlp=mlp
        ),
    )


def _normed_linear(
    config: TransformerConfig, backend: BackendSpecProvider, name: str
) -> tuple[ModuleSpec[nn.Module], ModuleSpec[Any]]:
    """A norm of this global name and the linear layer after it, in which a backend may hide the
    norm.
    """
    kind = config.normalization
    fused = backend.layernorm_column_parallel_linear(kind, config.norm_epsilon, name)
    if fused is None:
        return backend.norm(kind), backend.column_parallel_linear()
    return IDENTITY, fused


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
        execution=backend.execution(place.ctx),
    )
