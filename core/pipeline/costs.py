"""What the parts of a model cost: the units from which pipeline stages are composed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from core.config.parallel import RecomputeConfig
from core.config.precision import PrecisionConfig, bf16_layers
from core.config.transformer import TransformerConfig

ATTENTION_FORWARD = 690 / 554
"""What a FLOP of attention's forward pass costs beside one of a matrix product: their rates on an
H200 in TFLOP/s (`benchmarks/notes.md`)."""

ATTENTION_BACKWARD = 2.5 * 690 / 476
"""What its backward pass costs per FLOP of its forward pass: a kernel makes five products, the
forward pass two."""

FP8_PRODUCT = 0.6
"""What a FLOP of a product in FP8 costs beside one in bf16, quantising included: there, the layers'
products took 487 of 840 ms in bf16, and the whole step 654 ms in FP8."""


@dataclass(frozen=True)
class Work:
    """Time or FLOPs of one microbatch, in any unit that is the same for all parts."""

    forward: float = 0.0
    """Forward pass."""
    backward_input: float = 0.0
    """Gradient of the inputs."""
    backward_weight: float = 0.0
    """Gradient of the weights."""

    @property
    def total(self) -> float:
        """All three together."""
        return self.forward + self.backward_input + self.backward_weight

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.forward + other.forward,
            self.backward_input + other.backward_input,
            self.backward_weight + other.backward_weight,
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One unit of a model that is never cut, such as a layer. A model is a sequence of parts."""

    symbol: str
    """One letter for its kind in a layout: E embedding, t layer, L head and loss, or others."""
    name: str
    """What it is in messages and tables."""
    work: Work
    """Its cost when it is trained and something trainable stands before it."""
    parameters: int = 0
    """Parameters it holds."""
    tied: int = 0
    """How many of them are those of a table that other parts hold too."""
    frozen: bool = False
    """Not trained."""

    @property
    def trainable(self) -> bool:
        """Has weights that take a gradient."""
        return self.parameters > 0 and not self.frozen


def effective_work(parts: Sequence[Part]) -> tuple[Work, ...]:
    """What each part of a model really costs, given which are frozen.

    A part without trainable weights has no weight gradient, and where nothing trainable stands
    before it, no backward pass at all. (The first trainable part is counted with all of its input
    gradient, most of which it needs within itself.)
    """
    costs = []
    below = False
    for part in parts:
        below = below or part.trainable
        work = part.work if part.trainable else replace(part.work, backward_weight=0.0)
        costs.append(work if below else replace(work, backward_input=0.0))
    return tuple(costs)


def language_model_parts(
    config: TransformerConfig,
    seq_length: int,
    *,
    causal: bool = True,
    recompute: RecomputeConfig | None = None,
    precision: PrecisionConfig | None = None,
) -> tuple[Part, ...]:
    """Embedding `E`, layers `t` and head with loss `L`, with their FLOPs per token.

    Those of attention and of FP8 are counted by the time that they take, as FLOPs of a product in
    bf16 (`ATTENTION_FORWARD`, `ATTENTION_BACKWARD`, `FP8_PRODUCT`); attention's scores and values
    have no weights. What a layer recomputes belongs to its input gradient, which waits for it. A
    tied table is counted in both parts that need it: as a rule they lie on different stages.

    Args:
        config: architecture.
        seq_length: tokens of a sequence, on which the cost of attention depends.
        causal: count half of the attention matrix, as a kernel that skips the rest takes.
        recompute: what is computed twice; by default nothing. Not counted for the method `block`,
            which gives every piece as many such layers wherever the model is cut.
        precision: which layers multiply in FP8; by default none.
    """
    h, table = config.hidden_size, config.hidden_size * config.vocab_size
    positions = h * config.max_position_embeddings if config.position_embedding == "learned" else 0
    norm = h * _norm_vectors(config.normalization)
    head = Work(2.0 * table, 2.0 * table, 2.0 * table)
    tied = table if config.tie_embeddings else 0
    plain = bf16_layers(precision or PrecisionConfig(), config.num_layers)
    again = recompute or RecomputeConfig()
    flops = _scores(config, seq_length, causal=causal)
    return (
        Part(symbol="E", name="embedding", work=Work(), parameters=table + positions, tied=tied),
        *(
            _layer(config, layer, scores, again, 1.0 if layer in plain else FP8_PRODUCT)
            for layer, scores in enumerate(flops)
        ),
        Part(symbol="L", name="head and loss", work=head, parameters=table + norm, tied=tied),
    )


def _scores(config: TransformerConfig, seq_length: int, *, causal: bool) -> Iterator[float]:
    """FLOPs of attention's scores and values in the forward pass of each layer, for a token."""
    for layer in range(config.num_layers):
        alone = replace(
            config,
            num_layers=1,
            sliding_window=config.window_of(layer),
            sliding_window_layers=None,
        )
        whole = alone.flops_per_token(seq_length, causal=causal)
        yield (whole - 6 * (sum(_products(config)) + config.hidden_size * config.vocab_size)) / 3


def _products(config: TransformerConfig) -> tuple[int, int]:
    """Weights of a layer's attention and MLP that are multiplied."""
    h, dim = config.hidden_size, config.kv_channels
    attention = 2 * h * dim * (config.num_attention_heads + config.kv_heads)
    return attention, (3 if config.gated_mlp else 2) * h * config.ffn_hidden_size


def _layer(
    config: TransformerConfig, layer: int, scores: float, again: RecomputeConfig, rate: float
) -> Part:
    """A layer, given the FLOPs of its scores and what a FLOP of its products costs."""
    attention, mlp = _products(config)
    products, look = 2 * rate * (attention + mlp), ATTENTION_FORWARD * scores
    forward = products + look
    twice = 0.0
    if again.granularity == "full" and again.method == "uniform":
        twice = forward
    elif again.granularity == "selective":
        costs = {"core_attention": look, "mlp": 2 * rate * mlp, "norm": 0.0}
        twice = sum(costs[module] for module in again.modules)
    return Part(
        symbol="t",
        name=f"layer {layer}",
        work=Work(forward, products + ATTENTION_BACKWARD * scores + twice, products),
        parameters=attention + mlp + _vectors(config),
    )


def _vectors(config: TransformerConfig) -> int:
    """Parameters of a layer's norms and biases."""
    h, dim = config.hidden_size, config.kv_channels
    qkv = (config.num_attention_heads + 2 * config.kv_heads) * dim
    up = (2 if config.gated_mlp else 1) * config.ffn_hidden_size
    vectors = 2 * h * _norm_vectors(config.normalization)
    vectors += 0 if config.qk_norm == "none" else 2 * dim * _norm_vectors(config.qk_norm)
    vectors += config.qkv_bias * qkv + config.attention_output_bias * h
    return vectors + config.mlp_bias * (up + h)


def _norm_vectors(kind: str) -> int:
    return 2 if kind == "layernorm" else 1
