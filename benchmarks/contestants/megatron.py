"""Megatron-Core's GPT model, data-parallel wrapper and distributed optimizer on one GPU, with its
own schedule and every fusion that it has for the architecture: what its training script sets for
such a run, except that one process needs no launcher.
"""

import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from benchmarks.contestants.registry import (
    BETAS,
    CLIP,
    EPSILON,
    LEARNING_RATE,
    SEED,
    WEIGHT_DECAY,
)
from benchmarks.contestants.weights import conversion_of, initial_weights
from benchmarks.train_step import random_tokens
from benchmarks.workloads import Workload
from core.config.transformer import TransformerConfig
from core.errors import ConfigError


class Megatron:
    """Megatron-Core, its layers from Transformer Engine or its own."""

    def __init__(
        self,
        work: Workload,
        config: TransformerConfig,
        device: torch.device,
        *,
        spec: str,
        fp8: str | None = None,
    ) -> None:
        """Build from this project's initial weights.

        Args:
            work: shapes.
            config: architecture.
            device: where to run: a GPU, Megatron-Core knows no other.
            spec: `transformer_engine`, or `local` for its own layers (whose attention keeps all
                scores).
            fp8: recipe, in Megatron-Core's words; None: bf16.

        Raises:
            ConfigError: an architecture that it cannot say.
        """
        _offer_weight_gradient_kernel()
        if fp8 == "delayed":
            _match_delayed_scaling()
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        self._work, self._vocabulary, self._device = work, config.vocab_size, device
        self._number = 0
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
            model_parallel_cuda_manual_seed(SEED)
        settings = _settings(config, spec, fp8)
        model = _model(config, settings, spec).to(device)
        family = conversion_of(work.preset)
        load_weights(model, config, initial_weights(family, config, device))
        self.model = DistributedDataParallel(
            settings,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True
            ),
            Float16Module(settings, model),
        )
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=LEARNING_RATE,
                min_lr=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                bf16=True,
                params_dtype=torch.bfloat16,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                adam_eps=EPSILON,
                clip_grad=CLIP,
                use_distributed_optimizer=True,
                fp8_recipe=fp8,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        for group in self._optimizer.param_groups:  # what its scheduler does at a constant rate
            group["lr"] = LEARNING_RATE * group["lr_mult"]
            group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
        settings.no_sync_func = self.model.no_sync
        settings.finalize_model_grads_func = finalize_model_grads

    def step(self) -> Tensor:
        """Run the next step; returns its mean loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        work = self._work
        self.model.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=self._batches(),
            model=[self.model],
            num_microbatches=work.microbatches,
            seq_length=work.seq_length,
            micro_batch_size=work.micro_batch_size,
            forward_only=False,
        )
        self._optimizer.step()
        self._number += 1
        return torch.stack(losses).mean()

    def token_losses(self) -> Tensor:
        """Losses of the first microbatch."""
        # As its schedule does before the first of a step. Otherwise delayed scaling keeps weights
        # as it has cast them in the very first pass, when it did not know their scale.
        self.model.set_is_first_microbatch()
        losses, _ = _forward(self._batches(), self.model)
        return losses.detach()

    def _batches(self) -> Iterator[Tensor]:
        work = self._work
        shape = (work.micro_batch_size, work.seq_length + 1)
        for i in range(work.microbatches):
            yield random_tokens(shape, self._vocabulary, self._device, self._number, i, 0)


def _forward(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    """A microbatch's token losses, and what reduces them."""
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    losses = model(inputs, positions, None, labels=labels)

    def reduce(losses: Tensor) -> tuple[Tensor, Tensor]:
        mean = losses.float().mean()
        return mean, mean.detach().clone()

    return losses, reduce


def _settings(config: TransformerConfig, spec: str, fp8: str | None) -> Any:
    """The architecture and the fusions, in Megatron-Core's words."""
    from megatron.core.transformer import TransformerConfig as MegatronConfig

    bias = config.attention_output_bias and config.mlp_bias
    fused = {"silu": config.gated_mlp, "gelu_tanh": config.gated_mlp or bias}
    fuse = fused.get(config.activation, False)
    activations = {
        "silu": F.silu,
        "gelu": F.gelu,
        # Its fused form of gelu is that with tanh.
        "gelu_tanh": F.gelu if fuse else partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
    }
    if config.qk_norm != "none" or config.sliding_window is not None:
        raise ConfigError("Megatron-Core is built here without query norms and sliding windows")
    engine = spec == "transformer_engine"
    quantised: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": fp8} if fp8 else {}
    if fp8 == "delayed":
        quantised |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return MegatronConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.kv_channels,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[config.normalization],
        layernorm_epsilon=config.norm_epsilon,
        activation_func=activations[config.activation],
        gated_linear_unit=config.gated_mlp,
        add_bias_linear=bias,
        add_qkv_bias=config.qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=True,
        bias_activation_fusion=fuse,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
        apply_rope_fusion=engine and config.position_embedding == "rope",
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="te" if engine else "native",
        **quantised,
    )


def _model(config: TransformerConfig, settings: Any, spec: str) -> Any:
    """The model, its weights not filled.

    Raises:
        ConfigError: positions that it cannot say.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    if spec == "transformer_engine":
        layers = get_gpt_layer_with_transformer_engine_spec()
    else:
        layers = get_gpt_layer_local_spec(normalization=settings.normalization)
    rope, positions = config.rope, config.position_embedding
    if positions == "rope" and rope.type not in ("default", "llama3"):
        raise ConfigError(f"Megatron-Core's GPT model has no rotary embedding of type {rope.type}")
    return GPTModel(
        settings,
        layers,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="rope" if positions == "rope" else "learned_absolute",
        rotary_percent=rope.partial_factor,
        rotary_base=int(rope.theta),
        rope_scaling=rope.type == "llama3",
        rope_scaling_factor=rope.factor,
    )


def load_weights(model: Any, config: TransformerConfig, weights: dict[str, Tensor]) -> None:
    """Fill Megatron-Core's model from this project's weights.

    Raises:
        ValueError: a parameter of either side has no partner of its shape.
    """
    renamed = {megatron_name(name): (name, value) for name, value in weights.items()}
    left = set(renamed)
    for name, parameter in model.named_parameters():
        plain = megatron_name(name)
        if plain not in renamed:
            raise ValueError(f"Megatron-Core's parameter {name} has no partner")
        left.discard(plain)
        ours, value = renamed[plain]
        if ".linear_qkv." in ours:
            value = group_interleaved(value, config)
        if value.shape != parameter.shape:
            raise ValueError(
                f"Megatron-Core's parameter {name} has the shape {tuple(parameter.shape)}, ours "
                f"{tuple(value.shape)}"
            )
        parameter.data.copy_(value)
    if left:
        raise ValueError(f"Megatron-Core's model has no place for {sorted(left)}")


def megatron_name(name: str) -> str:
    """One name for a parameter of ours, of Megatron-Core's own layers, and of its Transformer
    Engine layers, which hold a norm inside the linear layer that follows it.
    """
    for other, plain in (
        ("self_attention.linear_qkv.layer_norm_", "input_norm."),
        ("mlp.linear_fc1.layer_norm_", "pre_mlp_norm."),
        ("input_layernorm.", "input_norm."),
        ("pre_mlp_layernorm.", "pre_mlp_norm."),
        ("final_layernorm.", "final_norm."),
    ):
        name = name.replace(other, plain)
    return name


def group_interleaved(qkv: Tensor, config: TransformerConfig) -> Tensor:
    """Rows `[q | k | v]`, whole blocks, to Megatron-Core's order: for each key head its queries,
    then its key, then its value.
    """
    dim, groups = config.kv_channels, config.kv_heads
    sizes = [config.num_attention_heads * dim, groups * dim, groups * dim]
    parts = [part.unflatten(0, (groups, -1)) for part in qkv.split(sizes)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _match_delayed_scaling() -> None:
    """Make Megatron-Core's recipe of delayed scaling without an argument that Transformer Engine
    no longer takes since it always had one value: no product was left out of FP8.
    """
    from megatron.core import fp8_utils
    from transformer_engine.common.recipe import DelayedScaling

    class Recipe(DelayedScaling):
        def __init__(
            self, config: Any, fp8_format: Any, override_linear_precision: tuple[bool, ...]
        ) -> None:
            assert not any(override_linear_precision)
            super().__init__(
                margin=config.fp8_margin,
                fp8_format=fp8_format,
                amax_history_len=config.fp8_amax_history_len,
                amax_compute_algo=config.fp8_amax_compute_algo,
                fp8_dpa=config.fp8_dot_product_attention,
                fp8_mha=config.fp8_multi_head_attention,
            )

    fp8_utils.TEDelayedScaling = Recipe


def _offer_weight_gradient_kernel() -> None:
    """Stand in for APEX's module of this name, which Megatron-Core imports to add a weight's
    gradient to its fp32 sum inside the product; torch has that product now.
    """
    name = "fused_weight_gradient_mlp_cuda"
    if name in sys.modules:
        return
    module = ModuleType(name)

    def accumulate(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)

    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]  # a made module
    sys.modules[name] = module
