"""The architecture of a transformer, and nothing else: no parallelism, no precision, no
training.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2021) in Hugging Face's half-split form, and its
    extensions.
    """

    theta: float = 10000.0
    """Base of the geometric frequencies."""
    type: Literal["default", "linear", "llama3", "yarn"] = "default"
    """How frequencies are stretched for longer contexts."""
    partial_factor: float = 1.0
    """Share of each head that is rotated."""
    factor: float = 1.0
    """linear, llama3, yarn: how much longer the context becomes."""
    original_max_position_embeddings: int | None = None
    """llama3, yarn: the context length before stretching."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / low_freq_factor are stretched whole."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / high_freq_factor are kept."""
    beta_fast: float = 32.0
    """yarn: rotations above which a frequency is kept."""
    beta_slow: float = 1.0
    """yarn: rotations below which a frequency is stretched whole."""
    attention_factor: float | None = None
    """yarn: scale of cos and sin; by default 0.1 ln(factor) + 1, or from mscale and
    mscale_all_dim."""
    mscale: float | None = None
    """yarn: numerator of the attention factor (DeepSeek's variant)."""
    mscale_all_dim: float | None = None
    """yarn: denominator of the attention factor."""
    truncate: bool = True
    """yarn: round the ends of the ramp to whole dimensions."""

    @property
    def is_scaled(self) -> bool:
        """Whether frequencies differ from plain rotary embedding."""
        return self.type != "default"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Architecture of a stack of transformer layers with an embedding and a head."""

    INCIDENTAL: ClassVar[tuple[str, ...]] = (
        "attention_dropout",
        "hidden_dropout",
        "init_std",
        "scale_output_init",
        "max_position_embeddings",
    )
    """Fields that may differ between a model and the weights it is filled with."""

    num_layers: int
    """Number of layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int | None = None
    """Key and value heads; by default as many as query heads."""
    head_dim: int | None = None
    """Size of one head; by default hidden_size / num_attention_heads."""
    ffn_hidden_size: int
    """Inner width of the MLP (of one half, where it is gated)."""
    vocab_size: int
    """Number of tokens, without padding."""
    max_position_embeddings: int
    """Longest sequence the model is meant for."""

    position_embedding: Literal["rope", "learned", "none"] = "rope"
    """How positions enter: rotary in attention, or a table of max_position_embeddings vectors that
    are added to the token vectors."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary embedding, where used."""

    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of all norms of the residual stream."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Activation of the MLP."""
    gated_mlp: bool = True
    """MLP of act(gate) * up (Shazeer, 2020) in place of act(up)."""

    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    attention_output_bias: bool = False
    """Bias on the attention output projection."""
    mlp_bias: bool = False
    """Biases on the MLP's projections."""
    qk_norm: Literal["none", "rmsnorm", "layernorm"] = "none"
    """Norm over each query and key head before rotary embedding."""
    attention_scale: float | None = None
    """Factor on attention scores; by default 1 / sqrt(head_dim)."""
    sliding_window: int | None = None
    """A token sees itself and this many tokens less one before it; None: all."""
    sliding_window_layers: tuple[int, ...] | None = None
    """Layers with the sliding window, by global index; None: every layer."""

    parallel_residual: bool = False
    """Attention and MLP of a layer read the same input, each through its own norm, and both are
    added to it (Wang & Komatsuzaki, "GPT-J", 2021, with one norm)."""
    tie_embeddings: bool = False
    """The head is the embedding table."""
    attention_dropout: float = 0.0
    """Dropout probability on attention weights."""
    hidden_dropout: float = 0.0
    """Dropout probability on what a branch adds to the residual stream, and on the embedding."""

    init_std: float = 0.02
    """Standard deviation of initial weights."""
    scale_output_init: bool = True
    """Divide the initial deviation of the two output projections of each layer by sqrt(2 *
    num_layers)."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Size of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def output_init_std(self) -> float:
        """Initial deviation of the attention and MLP output projections."""
        return (
            self.init_std / math.sqrt(2 * self.num_layers)
            if self.scale_output_init
            else self.init_std
        )

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, by global index."""
        chosen = self.sliding_window_layers is None or layer in self.sliding_window_layers
        return self.sliding_window if chosen else None

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """Model FLOPs of forward and backward for one token, without recompute.

        6 per weight of every GEMM, the head included and the embedding look-up not, and attention
        scores and values with (`causal`) half of the sequence or with all of it: the two
        conventions in use differ by 12.5 % for an 8B model at 8192, so both are always printed.
        """
        heads, dim, h = self.num_attention_heads, self.kv_channels, self.hidden_size
        mlp = (3 if self.gated_mlp else 2) * h * self.ffn_hidden_size
        attention = h * dim * (2 * heads + 2 * self.kv_heads)
        weights = self.num_layers * (mlp + attention) + h * self.vocab_size
        scores = 0.0
        for layer in range(self.num_layers):
            window = min(self.window_of(layer) or seq_length, seq_length)
            # Mean number of keys a token sees: half of the window while it fills, all of it after
            # that.
            seen = window - window * window / (2 * seq_length) if causal else seq_length
            scores += 12 * heads * dim * seen
        return 6 * weights + scores


def _sizes_are_positive(config: TransformerConfig) -> None:
    for name in (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "ffn_hidden_size",
        "vocab_size",
        "max_position_embeddings",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: it must be at least 1")
    for name in ("norm_epsilon", "init_std"):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{name} is {getattr(config, name)}: it must be finite and above 0")


def _heads_divide(config: TransformerConfig) -> None:
    if config.num_attention_heads % config.kv_heads:
        raise ConfigError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_query_groups {config.kv_heads}: each key head must serve the same number of "
            "query heads"
        )
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}: change one, or give head_dim"
        )


def _rope_is_complete(config: TransformerConfig) -> None:
    rope = config.rope
    if config.position_embedding != "rope":
        if rope != RopeConfig():
            raise ConfigError(
                f"rope options do nothing with position_embedding {config.position_embedding}: "
                "leave them out"
            )
        return
    for name in ("theta", "partial_factor", "factor", "original_max_position_embeddings"):
        value = getattr(rope, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"rope.{name} is {value}: it must be finite and above 0")
    rotated = int(config.kv_channels * rope.partial_factor)
    if rotated % 2 or not 0 < rotated <= config.kv_channels:
        raise ConfigError(
            f"rope.partial_factor {rope.partial_factor} of head_dim {config.kv_channels} rotates "
            f"{rotated} dimensions: it must be an even number from 2 to head_dim"
        )
    if rope.type in ("llama3", "yarn") and rope.original_max_position_embeddings is None:
        raise ConfigError(f"rope.type {rope.type} needs rope.original_max_position_embeddings")
    if rope.type == "default" and rope.factor != 1.0:
        raise ConfigError(
            f"rope.factor {rope.factor} does nothing with rope.type default: choose linear, "
            "llama3 or yarn"
        )
    if rope.type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise ConfigError(
            f"rope.high_freq_factor {rope.high_freq_factor} must be above rope.low_freq_factor "
            f"{rope.low_freq_factor}"
        )


def _window_is_used(config: TransformerConfig) -> None:
    if config.sliding_window is not None and config.sliding_window < 1:
        raise ConfigError(f"sliding_window is {config.sliding_window}: it must be at least 1")
    if config.sliding_window is None and config.sliding_window_layers is not None:
        raise ConfigError(
            "sliding_window_layers does nothing without sliding_window: give both or neither"
        )
    outside = [i for i in config.sliding_window_layers or () if not 0 <= i < config.num_layers]
    if outside:
        raise ConfigError(
            f"sliding_window_layers names {outside}, but there are {config.num_layers} layers"
        )


def _attention_scale_is_positive(config: TransformerConfig) -> None:
    if config.attention_scale is not None and config.attention_scale <= 0.0:
        raise ConfigError(
            f"attention_scale is {config.attention_scale}: it must be above 0; leave it out for "
            "1 / sqrt(head_dim)"
        )


def _probabilities(config: TransformerConfig) -> None:
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(
                f"{name} is {getattr(config, name)}: it must be at least 0 and below 1"
            )


TRANSFORMER_RULES = (
    _sizes_are_positive,
    _heads_divide,
    _rope_is_complete,
    _window_is_used,
    _attention_scale_is_positive,
    _probabilities,
)


def validate_transformer(config: TransformerConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in TRANSFORMER_RULES:
        rule(config)


def canonical(config: TransformerConfig) -> TransformerConfig:
    """The same architecture with every default written out, so that two can be compared."""
    layers = tuple(i for i in range(config.num_layers) if config.window_of(i) is not None)
    return replace(
        config,
        num_query_groups=config.kv_heads,
        head_dim=config.kv_channels,
        sliding_window_layers=layers if 0 < len(layers) < config.num_layers else None,
        sliding_window=config.sliding_window if layers else None,
    )


def validate_length(config: TransformerConfig, seq_length: int) -> None:
    """Check that a model has positions for a whole sequence.

    Raises:
        ConfigError: the sequence is longer.
    """
    longest = config.max_position_embeddings
    if seq_length > longest:
        raise ConfigError(
            f"--data.seq-length {seq_length} is above --model.max-position-embeddings {longest}: "
            "shorten the sequence, or raise the model's limit"
        )


def validate_layout(
    config: TransformerConfig, tp: int, *, sequence_parallel: bool, seq_length: int
) -> None:
    """Check that an architecture can be cut over `tp` ranks.

    Raises:
        ConfigError: heads, MLP width or sequence do not divide.
    """
    if config.num_attention_heads % tp:
        raise ConfigError(
            f"num_attention_heads {config.num_attention_heads} cannot be divided over tp {tp}: "
            "choose a tp that divides it"
        )
    if config.kv_heads % tp and tp % config.kv_heads:
        raise ConfigError(
            f"num_query_groups {config.kv_heads} neither divides tp {tp} nor is divided by it: "
            "choose another tp"
        )
    if config.ffn_hidden_size % tp:
        raise ConfigError(
            f"ffn_hidden_size {config.ffn_hidden_size} cannot be divided over tp {tp}: choose a tp "
            "that divides it"
        )
    if sequence_parallel and seq_length % tp:
        raise ConfigError(
            f"--data.seq-length {seq_length} cannot be divided over tp {tp}, which sequence "
            "parallelism needs: change one of them"
        )


def validate_attention(
    config: TransformerConfig, device: str, *, seq_length: int, separate_documents: bool = False
) -> None:
    """Check that there is an attention kernel for an architecture on a kind of device.

    Raises:
        ConfigError: dropout within documents, or within a window that hides something, on a GPU.
    """
    if device != "cuda" or not config.attention_dropout:
        return
    windows = (config.window_of(layer) for layer in range(config.num_layers))
    window = min((size for size in windows if size is not None), default=seq_length)
    if window < seq_length:
        raise ConfigError(
            f"attention_dropout {config.attention_dropout} with a sliding_window of {window} below "
            f"--data.seq-length {seq_length} is only built for the CPU: set attention_dropout to 0"
        )
    if separate_documents:
        raise ConfigError(
            f"attention_dropout {config.attention_dropout} with documents that do not see each "
            "other (--data.reset-attention-mask, packed --data.sft) is only built for the CPU: set "
            "attention_dropout to 0"
        )
