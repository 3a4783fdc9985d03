"""How much memory each pipeline stage will need, from shapes alone: parameters with their gradients
and optimizer state, and what the microbatches in flight keep.

What a layer keeps is what `core/layers` and `core/kernels` save for their backward passes on CUDA,
where the functions between GEMMs are compiled and attention keeps no scores. A test counts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.pipeline.layout import Layout
from core.pipeline.schedules import Kind, Schedule
from core.pipeline.simulate import RECEIVE_SLOTS, Costs, simulate

_FORMAT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
_LABEL_BYTES, _STATISTIC_BYTES = 8, 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter on one rank, on the average of the data-parallel ranks."""

    weights: float
    gradients: float
    masters: float
    moments: float

    @property
    def total(self) -> float:
        """All four together."""
        return self.weights + self.gradients + self.masters + self.moments


def state_bytes(
    precision: PrecisionConfig, mode: Literal["zero1", "fsdp2", "replicated"], dp: int
) -> StateBytes:
    """What a parameter takes; tensor and pipeline parallelism divide the parameters themselves.

    Args:
        precision: formats.
        mode: of data parallelism.
        dp: data-parallel ranks.
    """
    own = _FORMAT_BYTES[precision.dtype]
    wide = max(own, 4)
    moments = 2 * (2 if precision.moments == "bf16" else wide)
    if mode == "fsdp2" and dp > 1:
        return StateBytes(wide / dp, wide / dp, 0.0, moments / dp)
    masters = 0 if own == wide else 2 if precision.master_weights == "remainder" else wide
    sharded = dp if mode == "zero1" else 1
    return StateBytes(own, wide, masters / sharded, moments / sharded)


@dataclass(frozen=True)
class Kept:
    """Bytes that a part of a model keeps of one microbatch."""

    activations: int = 0
    """From the forward pass to the backward pass."""
    products: int = 0
    """From the input gradient to the weight gradient, where a schedule puts that off: inputs and
    output gradients of the linear layers."""
    working: int = 0
    """The most that the part's own backward pass holds beside its activations."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """What passes through a model at a time, and how it is cut over tp."""

    seq_length: int
    """Tokens of a sample."""
    size: int = 1
    """Samples."""
    dtype: Literal["fp64", "fp32", "bf16", "fp16"] = "bf16"
    """Format of the computation."""
    tp: int = 1
    """Tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Whether activations between tensor-parallel regions are cut too."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.seq_length * self.size

    def hidden_bytes(self, config: TransformerConfig) -> int:
        """Hidden states on one rank: what is sent from stage to stage."""
        whole = self.tokens * config.hidden_size * _FORMAT_BYTES[self.dtype]
        return whole // (self.tp if self.sequence_parallel else 1)


def language_model_kept(config: TransformerConfig, batch: Microbatch) -> tuple[Kept, ...]:
    """What embedding, layers, and head with loss keep, part by part as `language_model_parts` cuts
    them. Without dropout and recompute.
    """
    tokens, tp = batch.tokens, batch.tp
    item = _FORMAT_BYTES[batch.dtype]
    wide = max(item, _STATISTIC_BYTES)
    local = batch.hidden_bytes(config)
    whole = tokens * config.hidden_size * item
    norm = local // (config.hidden_size * item) * wide  # one number a token: 1 / rms
    norm *= 2 if config.normalization == "layernorm" else 1

    heads = config.num_attention_heads // tp
    groups = max(1, config.kv_heads // tp)
    dim = config.kv_channels * tokens * item
    q, kv = heads * dim, groups * dim
    inner = config.ffn_hidden_size // tp * tokens * item
    up = (2 if config.gated_mlp else 1) * inner
    rotated = q + kv if config.position_embedding == "rope" else 0
    head_norms = 0 if config.qk_norm == "none" else tokens * (heads + groups) * wide
    if config.qk_norm == "layernorm":
        head_norms *= 2
    statistics = heads * tokens * wide  # of attention: a number for each query

    attention = 2 * local + norm + q + 2 * kv + rotated + head_norms + q + statistics
    mlp = 2 * local + norm + up + inner
    # Inputs of the four linear layers and gradients of their outputs.
    products = (local + q + 2 * kv) + (q + whole) + (local + up) + (inner + whole)
    layer = Kept(attention + mlp, products, working=inner + up + 2 * whole)

    logits = -(-config.vocab_size // tp) * tokens * item
    loss = tokens * (2 * wide + _LABEL_BYTES)
    head = Kept(2 * local + norm + logits + loss, local + logits, working=2 * whole)
    look_up = tokens * _LABEL_BYTES
    embedding = Kept(look_up, look_up, working=whole)
    return (embedding, *[layer] * config.num_layers, head)


@dataclass(frozen=True)
class PeakMemory:
    """Predicted bytes on a rank of one stage."""

    state: int
    """Weights, gradients and optimizer state."""
    activations: int
    """The most that the microbatches in flight keep at a time, with what a backward pass holds
    beside."""
    messages: int
    """Room for messages that come, and those that are being sent."""

    @property
    def total(self) -> int:
        """All together."""
        return self.state + self.activations + self.messages


def predict_peak(
    layout: Layout,
    schedule: Schedule,
    kept: Sequence[Kept],
    state: Sequence[float],
    message_bytes: int,
) -> tuple[PeakMemory, ...]:
    """The peak of each stage in a training step.

    Args:
        layout: which part is where.
        schedule: what the stages do.
        kept: for every part.
        state: bytes of weights, gradients and optimizer state, for every stage.
        message_bytes: size of one message.
    """
    where = layout.stage_map
    apart = any(a.kind == Kind.BACKWARD_INPUT for stage in schedule.actions for a in stage)
    pieces = [kept[start:stop] for start, stop in pairwise(layout.bounds)]
    result = simulate(
        schedule,
        Costs(
            work=layout.work,
            activation_bytes=tuple(sum(part.activations for part in piece) for piece in pieces),
            product_bytes=tuple(sum(part.products for part in piece) for piece in pieces),
            working_bytes=tuple(_working(piece, apart) for piece in pieces),
            receive_slots=RECEIVE_SLOTS,
        ),
    )
    messages = [0] * where.stages
    for edge, most in result.peak_messages.items():
        messages[edge.target] += RECEIVE_SLOTS
        messages[edge.source] += max(1, most - RECEIVE_SLOTS)
    return tuple(
        PeakMemory(round(state[stage]), result.peak_bytes[stage], messages[stage] * message_bytes)
        for stage in range(where.stages)
    )


def _working(parts: Sequence[Kept], apart: bool) -> int:
    """The most that a piece's backward pass holds beside the activations of all its parts: parts
    are done from the last to the first, and each leaves nothing or, if weight gradients are put
    off, what their products need.
    """
    most = released = 0
    for part in reversed(parts):
        most = max(most, part.working - released)
        released += part.activations - (part.products if apart else 0)
    return most
