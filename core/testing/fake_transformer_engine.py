"""A stand-in for Transformer Engine that computes with torch on a CPU, in any format: what of its
behaviour (2.20) this project builds on, so that all around it is tested where there is no GPU. It
imitates where weight gradients are put, when FP8 copies of weights are made, and when delayed
scales are recorded, used and updated.
"""

import importlib.machinery
import queue
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

from core.layers.transformer_engine import fp8_recipe

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Recipe:
    """Of any kind."""

    reduce_amax: bool = True


class DelayedScaling(Recipe):
    """Scales of steps before."""


class Float8CurrentScaling(Recipe):
    """Scales of now."""


class Float8BlockScaling(Recipe):
    """Here the same."""


@dataclass
class ScalingState:
    """Delayed scaling of some tensors."""

    scale: Tensor
    amax_history: Tensor
    format: torch.dtype

    def quantize(self, index: int, x: Tensor) -> Tensor:
        """Record the largest value and round, by the scale of before."""
        with torch.no_grad():
            self.amax_history[0, index] = torch.maximum(
                self.amax_history[0, index], x.abs().max().float()
            )
        limit = torch.finfo(self.format).max
        scaled = (x * self.scale[index]).float().clamp(-limit, limit)
        return scaled.to(self.format).to(x.dtype) / self.scale[index].to(x.dtype)

    def update(self) -> None:
        """New scales from the history, and a new row."""
        largest = self.amax_history.amax(0)
        limit = torch.finfo(self.format).max
        self.scale.copy_(torch.where(largest > 0, limit / largest, self.scale))
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0.0


@dataclass
class Globals:
    """What the package keeps for the process."""

    enabled: bool = False
    recipe: Recipe | None = None
    group: Any = None
    depth: int = 0
    first: bool = False
    states: list[tuple["_Base", Any, Recipe]] = field(default_factory=list)
    recomputes: bool = False
    again: bool = False

    def update(self, key: str) -> None:
        """Reduce and update all scales of one direction."""
        for module, group, recipe in self.states:
            state: ScalingState = module.fp8_meta[key]
            if recipe.reduce_amax and dist.is_initialized():
                row = state.amax_history[0].clone()
                dist.all_reduce(row, dist.ReduceOp.MAX, group=group)
                state.amax_history[0] = row
            state.update()


def _current(x: Tensor, kind: torch.dtype) -> Tensor:
    scale = torch.finfo(kind).max / x.abs().max().clamp(min=1e-30)
    return (x * scale).float().to(kind).to(x.dtype) / scale


def _gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _scattered(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group)
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


class _Linear(torch.autograd.Function):
    """`x W^T + b`; accumulates into `main_grad` itself."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: "_Base", first: Any
    ) -> Tensor:
        column = module.parallel_mode == "column"
        ctx.module, ctx.first, ctx.fused = module, first, module.fuse_wgrad_accumulation
        ctx.reduces = module.fp8 and module.state.first
        if module.fp8:
            module.state.first = False
        ctx.fp8, ctx.needs_bias = module.fp8, bias is not None
        ctx.weight = weakref.ref(weight)
        x = module.quantized("fwd", 0, x, E4M3)
        used = module.weight_copy(weight, first)
        ctx.save_for_backward(x, used)
        whole = _gathered(x, module.tp_group) if column and module.sequence_parallel else x
        y = F.linear(whole, used, bias)
        if not column and module.tp_size > 1:
            if module.sequence_parallel:
                return _scattered(y, module.tp_group)
            dist.all_reduce(y, group=module.tp_group)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x, used), module, dy = ctx.saved_tensors, ctx.module, grads[0]
        column, group = module.parallel_mode == "column", module.tp_group
        if not column and module.sequence_parallel:
            dy = _gathered(dy, group)
        if ctx.fp8:
            dy = module.quantized("bwd", 0, dy, E5M2)
        whole = _gathered(x, group) if column and module.sequence_parallel else x
        dx = dy @ used
        if column and module.tp_size > 1:
            if module.sequence_parallel:
                dx = _scattered(dx, group)
            else:
                dist.all_reduce(dx, group=group)
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(ctx, whole.flatten(0, -2), dy.flatten(0, -2))
        if ctx.reduces:
            module.state.update("scaling_bwd")
        return dx, dweight, dy.flatten(0, -2).sum(0) if ctx.needs_bias else None, None, None


def _weight_gradient(ctx: Any, x: Tensor, dy: Tensor) -> Tensor | None:
    module, weight = ctx.module, ctx.weight()
    assert weight is not None, "weight was removed while fuse_wgrad_accumulation=True"
    if not ctx.fused:
        assert module.wgrad_store is None, "would set .grad behind autograd's back"
        return dy.t() @ x
    main_grad = weight.main_grad

    def product() -> None:
        grad = dy.t().to(main_grad.dtype) @ x.to(main_grad.dtype)
        # As the real one: the first microbatch overwrites.
        main_grad.copy_(grad if ctx.first else main_grad + grad)

    if module.wgrad_store is not None:
        module.wgrad_store.put(product)
    else:
        product()
    return None


class _Base(nn.Module):
    """What linear modules share."""

    state: Globals
    """Of the installed stand-in."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        parallel_mode: str,
        tp_group: Any,
        tp_size: int,
        params_dtype: torch.dtype,
        **options: Any,
    ) -> None:
        super().__init__()
        assert options.pop("device") == "meta"
        delays = options.pop("delay_wgrad_compute")
        self.sequence_parallel = options.pop("sequence_parallel") and tp_size > 1
        assert not options, f"unexpected {options}"
        assert tp_size == 1 or dist.get_world_size(tp_group) == tp_size
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        sizes = [out_features, in_features]
        sizes[parallel_mode == "row"] //= tp_size
        empty: dict[str, Any] = {"device": "meta", "dtype": params_dtype}
        self.weight = nn.Parameter(torch.empty(sizes, **empty))
        self.bias = nn.Parameter(torch.empty(sizes[0], **empty)) if bias else None
        self.fuse_wgrad_accumulation = self.fp8 = False
        self.wgrad_store: queue.Queue[Callable[[], None]] | None = None
        if delays:
            self.wgrad_store = queue.Queue()
        self.fp8_meta: dict[str, Any] = {}
        self._workspace: Tensor | None = None
        self._stash: deque[tuple[Tensor, Tensor]] = deque()

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Make the scaling state once."""
        assert num_gemms == 1
        self.fp8 = self.state.enabled
        delayed = isinstance(self.state.recipe, DelayedScaling)
        if self.fp8 and delayed and "scaling_fwd" not in self.fp8_meta:
            for name, count, kind in (("fwd", 3, E4M3), ("bwd", 2, E5M2)):
                scaling = ScalingState(torch.ones(count), torch.zeros(64, count), kind)
                self.fp8_meta[f"scaling_{name}"] = scaling

    def backward_dw(self) -> None:
        """The oldest weight gradient that was put aside."""
        assert self.wgrad_store is not None
        self.wgrad_store.get_nowait()()

    def quantized(self, direction: str, index: int, x: Tensor, kind: torch.dtype) -> Tensor:
        """Rounded to FP8, if that is on."""
        if direction == "fwd" and not self.fp8:
            return x
        if isinstance(scaling := self.fp8_meta.get(f"scaling_{direction}"), ScalingState):
            return scaling.quantize(index, x)
        return _current(x, kind)

    def weight_copy(self, weight: Tensor, first: bool | None) -> Tensor:
        """The weight as the product takes it; kept for the step where a first microbatch is told of
        others.
        """
        if not self.fp8:
            return weight
        if first is False and self._workspace is not None:
            return self._workspace
        copy = self.quantized("fwd", 1, weight.detach(), E4M3)
        if first is not None:
            self._workspace = copy
        return copy

    def linear(self, x: Tensor, first: bool | None) -> Tensor:
        """The product, with what precedes and follows it."""
        for name, parameter in self.named_parameters():
            if parameter.dtype != x.dtype:
                raise TypeError(f"input is {x.dtype} and {name} {parameter.dtype}")
        stashes = self._before()
        y: Tensor = _Linear.apply(x, self.weight, self.bias, self, first)
        if stashes is not None:
            scaling: ScalingState = self.fp8_meta["scaling_fwd"]
            scaling.scale.copy_(stashes[0])
            scaling.amax_history.copy_(stashes[1])
        return y

    def _before(self) -> tuple[Tensor, Tensor] | None:
        """Scaling for this call; in a recomputed one, what to put back after it."""
        state = self.state
        if not (self.fp8 and state.again):
            self.init_fp8_metadata()
        scaling = self.fp8_meta.get("scaling_fwd") if self.fp8 else None
        if scaling is None:
            return None
        if state.again:
            kept = (scaling.scale.clone(), scaling.amax_history.clone())
            scale, history = self._stash.popleft()
            scaling.scale.copy_(scale)
            scaling.amax_history.copy_(history)
            return kept
        assert state.recipe is not None
        if all(module is not self for module, _, _ in state.states):
            state.states.append((self, state.group, state.recipe))
        if state.recomputes:
            self._stash.append((scaling.scale.clone(), scaling.amax_history.clone()))
        return None


class Linear(_Base):
    """Like the class of this name."""

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """`[..., i]` to `[..., o]`."""
        return self.linear(inp, is_first_microbatch)


class LayerNormLinear(_Base):
    """Like the class of this name."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, **options)
        assert normalization in ("RMSNorm", "LayerNorm")
        self.eps, self.normalization = eps, normalization
        empty: dict[str, Any] = {"device": "meta", "dtype": options["params_dtype"]}
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, **empty))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(in_features, **empty))

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """`[..., i]` to `[..., o]`."""
        width, weight = (inp.shape[-1],), self.layer_norm_weight
        if self.normalization == "RMSNorm":
            normed = F.rms_norm(inp, width, weight, self.eps)
        else:
            normed = F.layer_norm(inp, width, weight, self.layer_norm_bias, self.eps)
        return self.linear(normed, is_first_microbatch)


class RMSNorm(nn.Module):
    """Like the class of this name."""

    def __init__(
        self, normalized_shape: int, eps: float, *, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Like the class of this name."""

    def __init__(
        self, normalized_shape: int, eps: float, *, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__(normalized_shape, eps, dtype=dtype, device=device)
        self.bias = nn.Parameter(torch.empty_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., h]`."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class DotProductAttention(nn.Module):
    """Like the class of this name, without dropout."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        qkv_format: str,
        attn_mask_type: str,
        window_size: tuple[int, int],
        softmax_scale: float,
    ) -> None:
        super().__init__()
        assert (qkv_format, attention_dropout) == ("sbhd", 0.0)
        self.heads = (num_attention_heads, num_gqa_groups, num_gqa_groups)
        self.kv_channels, self.causal = kv_channels, attn_mask_type == "causal"
        self.window, self.scale = window_size, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[s, b, n, d]` and twice `[z, b, g, d]` to `[s, b, n * d]`."""
        for x, heads in zip((query, key, value), self.heads, strict=True):
            assert x.shape[2:] == (heads, self.kv_channels), x.shape
        behind = torch.arange(query.shape[0])[:, None] - torch.arange(key.shape[0])
        seen = torch.ones_like(behind, dtype=torch.bool)
        if self.window[0] >= 0:
            seen &= behind <= self.window[0]
        if self.window[1] >= 0 or self.causal:
            seen &= behind >= 0
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _region(state: Globals) -> Callable[..., Any]:
    @contextmanager
    def autocast(
        enabled: bool = True, recipe: Recipe | None = None, amax_reduction_group: Any = None
    ) -> Iterator[None]:
        before = (state.enabled, state.recipe, state.group, state.first)
        state.enabled, state.recipe, state.group = enabled, recipe, amax_reduction_group
        if state.depth == 0:
            state.first = True
        state.depth += 1
        try:
            yield
        finally:
            state.enabled, state.recipe, state.group, state.first = before
            state.depth -= 1
            if enabled and state.depth == 0 and torch.is_grad_enabled():
                state.update("scaling_fwd")

    return autocast


def _recompute(state: Globals, autocast: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def forward() -> Iterator[None]:
        state.recomputes = True
        try:
            yield
        finally:
            state.recomputes = False

    def checkpoint(fn: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
        assert not use_reentrant
        enabled, recipe = state.enabled, state.recipe

        @contextmanager
        def again() -> Iterator[None]:
            state.again = True
            try:
                with autocast(enabled, recipe):
                    yield
            finally:
                state.again = False

        with set_checkpoint_early_stop(False):
            return torch_checkpoint(
                fn, *args, use_reentrant=False, context_fn=lambda: (forward(), again())
            )

    return checkpoint


@contextmanager
def installed() -> Iterator[Globals]:
    """Make the stand-in what `import transformer_engine` finds, for as long."""
    state = Globals()
    autocast = _region(state)
    classes = (Linear, LayerNormLinear)
    offered: dict[str, dict[str, Any]] = {
        "transformer_engine": {"__version__": "stand-in"},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {
            kind.__name__: kind
            for kind in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling)
        },
        "transformer_engine.pytorch": {
            **{cls.__name__: type(cls.__name__, (cls,), {"state": state}) for cls in classes},
            **{cls.__name__: cls for cls in (RMSNorm, LayerNorm, DotProductAttention)},
            "autocast": autocast,
            "checkpoint": _recompute(state, autocast),
        },
    }
    before = {name: module for name, module in sys.modules.items() if _is_of(name)}
    fp8_recipe.cache_clear()
    try:
        for name in before:
            del sys.modules[name]
        for name, content in offered.items():
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            module.__dict__.update(content)
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
        yield state
    finally:
        for name in [name for name in sys.modules if _is_of(name)]:
            del sys.modules[name]
        sys.modules.update(before)
        fp8_recipe.cache_clear()


def _is_of(name: str) -> bool:
    return name.partition(".")[0] == "transformer_engine"
