"""Layers computed by NVIDIA's Transformer Engine. They declare the parameters of the local layers,
under the same global names, so that checkpoints and conversion do not see the difference.

A layer does not derive from a Transformer Engine module and has none as a child: it holds one
aside, made on the meta device, and lends it its own parameters before every call. What is in the
module tree is then what `declare_parameter` made, whatever a release (2.9 to 2.20 were read)
registers and however it initialises; and the package is imported where a layer is made, not before.

Legend: h width.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from core.config.transformer import TransformerConfig
from core.data_parallel.deferred import put_off
from core.data_parallel.derived import derived
from core.data_parallel.main_grad import say_ready
from core.kernels.attention import mask_generator
from core.kernels.masked_attention import AttentionMask
from core.layers.attention import CoreAttention
from core.layers.linear import ColumnParallelLinear, RowParallelLinear
from core.layers.norm import LayerNorm, RMSNorm, declare_norm
from core.parallel.context import ParallelContext
from core.parallel.cutting import split_units
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey

Recipe = Literal["none", "current", "delayed", "blockwise"]


@dataclass(frozen=True)
class EngineOptions:
    """What the backend decides for a linear layer."""

    fp8: Recipe = "none"
    """How its products are scaled."""
    among_fp8: bool = False
    """It stays in 16 bits while layers around it compute in FP8."""
    split_backward: bool = False
    """A pipeline schedule may put its weight gradient off."""


@cache
def fp8_recipe(fp8: Recipe, reduce_amax: bool) -> Any:
    """The recipe's object, always the same, by which Transformer Engine tells regions apart.

    Args:
        fp8: which; not none.
        reduce_amax: delayed only: whether ranks of tp agree on the largest values. Without a group
            Transformer Engine would take all processes.
    """
    from transformer_engine.common import recipe

    if fp8 == "delayed":
        return recipe.DelayedScaling(reduce_amax=reduce_amax)
    return recipe.Float8CurrentScaling() if fp8 == "current" else recipe.Float8BlockScaling()


def fp8_region(fp8: Recipe, ctx: ParallelContext) -> AbstractContextManager[object]:
    """To be entered around the forward pass of layers that compute in FP8, or around one in their
    midst that does not. Leaving the outermost region updates delayed scales: one all-reduce over
    tp.
    """
    import transformer_engine.pytorch as te

    if fp8 == "none":
        return te.autocast(enabled=False)
    recipe = fp8_recipe(fp8, ctx.tp.group is not None)
    return te.autocast(enabled=True, recipe=recipe, amax_reduction_group=ctx.tp.group)


class _Engine:
    """A Transformer Engine module that computes with a layer's parameters. No `nn.Module`, so that
    the layer does not register it.
    """

    def __init__(self, module: Any, owner: nn.Module, lent: Mapping[str, str]) -> None:
        """Hold a module.

        Args:
            module: as made.
            owner: the layer.
            lent: the module's names of parameters, to attributes of the layer.
        """
        self.module, self._lent = module, dict(lent)
        self.lend(owner)

    def lend(self, owner: nn.Module) -> Any:
        """The module, with the layer's parameters of this moment: FSDP2 exchanges the objects."""
        for theirs, ours in self._lent.items():
            self.module._parameters[theirs] = owner._parameters[ours]
        return self.module


class _AfterWeight(torch.autograd.Function):
    """The input of a linear layer, unchanged. Its backward pass comes right after the layer's own,
    which has then added the weight gradient to `main_grad` or put it aside. Nothing else tells:
    the layer returns no gradient of the weight, so no hook of autograd need run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, done: Callable[[], None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.done = done
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        ctx.done()
        return grads[0], None, None


class _LinearEngine(_Engine):
    """Runs a linear module: accumulation in fp32, FP8 copies of weights, gradients put off."""

    def __init__(
        self,
        module: Any,
        owner: nn.Module,
        lent: Mapping[str, str],
        place: Placement,
        options: EngineOptions,
    ) -> None:
        super().__init__(module, owner, lent)
        self._options, self._ctx = options, place.ctx
        if options.fp8 == "delayed":
            # Now, so that the scaling state lies where a checkpoint fills it.
            with torch.no_grad(), fp8_region(options.fp8, place.ctx):
                module.init_fp8_metadata(num_gemms=1)

    def __call__(self, owner: nn.Module, x: Tensor) -> Tensor:
        module, weight = self.lend(owner), owner._parameters["weight"]
        assert weight is not None
        trains = torch.is_grad_enabled() and hasattr(weight, "main_grad")
        module.fuse_wgrad_accumulation = trains
        if trains:
            x = _AfterWeight.apply(x, weight, lambda: self._weight_done(weight))
        with fp8_region("none", self._ctx) if self._options.among_fp8 else nullcontext():
            y: Tensor = module(x, is_first_microbatch=self._is_first(weight) if trains else None)
        return y

    def _is_first(self, weight: nn.Parameter) -> bool | None:
        """Whether this is the step's first microbatch; None outside of steps. In the first,
        Transformer Engine makes an FP8 copy of the weight, which the others use, and overwrites
        `main_grad`: it is zero then, for every schedule takes the microbatches in order.
        """
        mark = object()
        if derived(weight, lambda: mark) is not mark:
            return False
        return True if derived(weight, object) is mark else None

    def _weight_done(self, weight: nn.Parameter) -> None:
        def compute() -> None:
            # The oldest product that was put aside. All add to one sum: their order is free.
            self.module.backward_dw()
            say_ready(weight)

        if not self._options.split_backward:
            say_ready(weight)
        elif not put_off(weight, compute):
            compute()

    def scaling_state(self) -> dict[str, Tensor]:
        """Delayed scaling's largest values of past steps and its scales, as they lie in memory."""
        if self._options.fp8 != "delayed":
            return {}
        return {
            f"{name}_{direction}": getattr(self.module.fp8_meta[f"scaling_{direction}"], name)
            for direction in ("fwd", "bwd")
            for name in ("scale", "amax_history")
        }


class _EngineLinear(nn.Module):
    """What is put before a local linear layer in a class's bases: the layer is made as it is, and a
    Transformer Engine module computes in its place.
    """

    MODE: ClassVar[Literal["column", "row"]]
    weight: nn.Parameter
    bias: nn.Parameter | None
    skip_bias_add: bool

    def __init__(
        self, place: Placement, *features: Any, options: EngineOptions, **local: Any
    ) -> None:
        """As the local layer; `options` are the backend's."""
        super().__init__(place, *features, **local)
        tp, (rows, columns) = place.ctx.tp, self.weight.shape
        by_column = self.MODE == "column"
        adds_bias = self.bias is not None and not self.skip_bias_add
        # Where the input is cut the bias is added once, after the sum; and its gradient, put off
        # with that of the weight, would not pass through autograd.
        fuses_bias = adds_bias and by_column and not options.split_backward
        self._adds_bias = adds_bias and not fuses_bias
        make, more, lent = self._kind(place)
        # No userbuffers: they need NVLink multicast.
        module = make(
            columns if by_column else columns * tp.size,
            # Rows of replicated key heads count once for each holder.
            rows * tp.size if by_column else rows,
            bias=fuses_bias,
            parallel_mode=self.MODE,
            tp_group=tp.group,
            tp_size=tp.size,
            sequence_parallel=place.ctx.sequence_parallel,
            params_dtype=place.dtype,
            delay_wgrad_compute=options.split_backward,
            device="meta",
            **more,
        )
        lent = {"weight": "weight", **lent, **({"bias": "bias"} if fuses_bias else {})}
        self._engine = _LinearEngine(module, self, lent, place, options)

    def _kind(self, place: Placement) -> tuple[Any, dict[str, Any], dict[str, str]]:
        """The module's class, arguments of its own, and which parameters it is lent beside weight
        and bias.
        """
        import transformer_engine.pytorch as te

        return te.Linear, {}, {}

    def forward(self, x: Tensor) -> Tensor:
        """As the local layer."""
        y = self._engine(self, x)
        return y + self.bias if self._adds_bias and self.bias is not None else y

    def scaling_state(self) -> dict[str, Tensor]:
        """What FP8 keeps from step to step."""
        return self._engine.scaling_state()


class EngineColumnParallelLinear(_EngineLinear, ColumnParallelLinear):
    """Linear layer cut by output features."""

    MODE = "column"


class EngineRowParallelLinear(_EngineLinear, RowParallelLinear):
    """Linear layer cut by input features."""

    MODE = "row"


@dataclass(frozen=True)
class FusedNorm:
    """A norm that the linear layer after it computes."""

    kind: Literal["rmsnorm", "layernorm"]
    eps: float
    name: str
    """Global name that the norm would have by itself."""


class EngineNormColumnParallelLinear(EngineColumnParallelLinear):
    """A norm and the linear layer after it, cut by output features, as one."""

    def __init__(self, place: Placement, *features: Any, norm: FusedNorm, **local: Any) -> None:
        """As the local linear layer; `norm` and `options` are the backend's."""
        self._norm = norm
        super().__init__(place, *features, **local)

    def _kind(self, place: Placement) -> tuple[Any, dict[str, Any], dict[str, str]]:
        import transformer_engine.pytorch as te

        norm = self._norm
        local = RMSNorm if norm.kind == "rmsnorm" else LayerNorm
        width = self.weight.shape[1]
        declare_norm(self, place, local.PARAMETERS, width, prefix="norm_", norm=norm.name)
        more = {"eps": norm.eps, "normalization": local.__name__}
        lent = {f"layer_norm_{name}": f"norm_{name}" for name, _ in local.PARAMETERS}
        return te.LayerNormLinear, more, lent


class _EngineNorm(nn.Module):
    """A norm over the last dimension, by the Transformer Engine module of the local one's name."""

    LOCAL: ClassVar[type[RMSNorm] | type[LayerNorm]]

    def __init__(self, place: Placement, size: int, eps: float, *, per_head: bool = False) -> None:
        """As the local norm."""
        super().__init__()
        declare_norm(self, place, self.LOCAL.PARAMETERS, size, per_head=per_head)
        import transformer_engine.pytorch as te

        make = getattr(te, self.LOCAL.__name__)
        module = make(size, eps=eps, dtype=place.dtype, device="meta")
        self._engine = _Engine(module, self, {name: name for name, _ in self.LOCAL.PARAMETERS})

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]` to the same shape."""
        y: Tensor = self._engine.lend(self)(x)
        return y


class EngineRMSNorm(_EngineNorm):
    """Root mean square norm; it rounds once, after the weight is applied."""

    LOCAL = RMSNorm


class EngineLayerNorm(_EngineNorm):
    """Layer norm with weight and bias."""

    LOCAL = LayerNorm


class EngineCoreAttention(CoreAttention):
    """The attention itself, by the kernel that Transformer Engine chooses. In 16 bits always."""

    def __init__(self, config: TransformerConfig, place: Placement, **local: Any) -> None:
        """As the local attention."""
        super().__init__(config, place, **local)
        import transformer_engine.pytorch as te

        tp, causal, window = place.ctx.tp, self.pattern.causal, self.pattern.window
        behind = -1 if window is None else window - 1
        # Heads of this rank, and nothing said of tp: heads are independent, and key heads that
        # several ranks hold would not divide by it. Aside like other modules.
        self._kernels = {
            p: te.DotProductAttention(
                split_units(config.num_attention_heads, tp.rank, tp.size)[1],
                config.kv_channels,
                num_gqa_groups=split_units(config.kv_heads, tp.rank, tp.size)[1],
                attention_dropout=p,
                qkv_format="sbhd",
                attn_mask_type="causal" if causal else "no_mask",
                window_size=(behind, 0 if causal else -1),
                softmax_scale=self.pattern.scale,
            )
            for p in {0.0, self.p}
        }

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key: DropoutKey | None,
        mask: AttentionMask | None = None,
    ) -> Tensor:
        """As the local attention, which also serves masks that differ from row to row."""
        if mask is not None:
            return super().forward(q, k, v, key, mask)
        dropout = self._dropout(key)
        if dropout is None:
            y: Tensor = self._kernels[0.0](q, k, v)
            return y
        with mask_generator(dropout, q.device):
            y = self._kernels[self.p](q, k, v)
        return y
