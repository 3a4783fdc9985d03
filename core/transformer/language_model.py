"""A decoder-only language model: embedding, stack of layers, head, loss. Families differ in the
layers' specs.

Its parts, as a pipeline cuts them, are the embedding (part 0), the layers (1 to n), and final norm
and head with the loss (n + 1).

Legend: b batch, s sequence, h width, v this rank's part of the vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.config.parallel import RecomputeConfig
from core.config.transformer import TransformerConfig
from core.generation.cache import KeyValueCache
from core.kernels.cross_entropy import vocab_parallel_cross_entropy
from core.kernels.masked_attention import Documents
from core.layers.dropout import Dropout
from core.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from core.layers.forward_info import ForwardInfo
from core.layers.positions import LearnedPositions
from core.layers.rotary import RotaryEmbedding
from core.parallel.collectives import gather_last
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey, normal_init
from core.spec import IDENTITY, ModuleSpec
from core.transformer.execution import Execution
from core.transformer.stack import LayerStack

TABLE = "embedding.word_embeddings.weight"
"""Global name of the table that a tied head shares."""


class TokenEmbedding(nn.Module):
    """Token vectors, learned positions where the config has them, and the dropout on the sum."""

    def __init__(self, config: TransformerConfig, place: Placement, across: str | None) -> None:
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            place,
            config.vocab_size,
            config.hidden_size,
            init=normal_init(config.init_std),
            across=across,
        )
        self.position_embeddings = None
        if config.position_embedding == "learned":
            self.position_embeddings = LearnedPositions(
                place,
                config.max_position_embeddings,
                config.hidden_size,
                init=normal_init(config.init_std),
            )
        self.dropout = Dropout(place.ctx, config.hidden_dropout, "embedding.dropout")

    def forward(
        self, tokens: Tensor, key: DropoutKey | None, positions: Tensor | None = None
    ) -> Tensor:
        """`[b, s]` to `[s, b, h]` (`[s / tp, b, h]` under sequence parallelism); for `positions`
        see `LearnedPositions`.
        """
        hidden = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings(tokens.shape[1], positions)
        out: Tensor = self.dropout(hidden, key)
        return out


class LanguageModel(nn.Module):
    """Tokens to the loss of every token, or to logits; or a piece of that."""

    def __init__(
        self,
        config: TransformerConfig,
        place: Placement,
        *,
        layers: Mapping[int, ModuleSpec[Any]],
        final_norm: ModuleSpec[nn.Module],
        recompute: RecomputeConfig | None = None,
        execution: Execution | None = None,
    ) -> None:
        """Build embedding, layers and head, or those of them that `place` holds; parameters are not
        yet initialised.

        Args:
            config: architecture.
            place: axes, format, device and parts.
            layers: global layer number to spec, for all layers of the model.
            final_norm: spec of the norm before the head.
            recompute: which activations are recomputed; none by default.
            execution: how the backend wants its layers run.
        """
        super().__init__()
        self.config = config
        has_embedding, has_head = place.holds(0), place.holds(len(layers) + 1)
        across = TABLE if config.tie_embeddings and has_embedding != has_head else None
        self.embedding = TokenEmbedding(config, place, across) if has_embedding else None
        self.rotary = None
        if config.position_embedding == "rope":
            self.rotary = RotaryEmbedding(config.rope, config.kv_channels)
        self.decoder = LayerStack(
            config,
            place,
            name="decoder",
            layers={i: spec for i, spec in layers.items() if place.holds(i + 1)},
            final_norm=final_norm if has_head else IDENTITY,
            recompute=recompute or RecomputeConfig(),
            execution=execution,
        )
        self.output_layer = None
        if has_head:
            tied = None
            if config.tie_embeddings and self.embedding is not None:
                tied = self.embedding.word_embeddings
            self.output_layer = VocabParallelHead(
                place,
                config.vocab_size,
                config.hidden_size,
                init=normal_init(config.init_std),
                tied_to=tied,
                across=across,
            )

    def hidden_states(
        self,
        tokens: Tensor,
        key: DropoutKey | None = None,
        received: Tensor | None = None,
        *,
        documents: Documents | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """`[b, s]` to the input of the head, `[s, b, h]` (`[s / tp, b, h]` under sequence
        parallelism); without the embedding, from `received`, hidden states of that shape.

        Positions count from the start of a row, or of each document. With a cache, which says at
        which positions they stand, the tokens go on from those before.
        """
        length = tokens.shape[1]
        positions = None if documents is None else documents.positions
        if cache is not None and cache.positions is not None:
            length, positions = cache.capacity, cache.positions
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary.at(positions, length, tokens.device)
        hidden = received if self.embedding is None else self.embedding(tokens, key, positions)
        assert hidden is not None
        out: Tensor = self.decoder(
            hidden, ForwardInfo(rotary, key, documents=documents, cache=cache)
        )
        return out

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        key: DropoutKey | None = None,
        label_smoothing: float = 0.0,
        received: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Cross entropy of every token, in at least fp32; or without the head, hidden states.

        Args:
            tokens: int64 `[b, s]`.
            labels: int64 `[b, s]`, what follows each token.
            key: makes dropout masks; None in evaluation.
            label_smoothing: share of the target that all tokens divide among them.
            received: hidden states from the piece before, unless the embedding is here.
            documents: what attention must not cross; None where a row is one text.

        Returns:
            `[b, s]`, the same on all tp ranks; hidden states are `[s, b, h]` (`[s / tp, b, h]`
            under sequence parallelism).
        """
        hidden = self.hidden_states(tokens, key, received, documents=documents)
        if self.output_layer is None:
            return hidden
        logits = self.output_layer(hidden)
        losses = vocab_parallel_cross_entropy(
            logits.flatten(0, 1), labels.t().flatten(), self.output_layer.part, label_smoothing
        )
        return losses.view(labels.shape[1], labels.shape[0]).t()

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits of the whole vocabulary, `[b, s, vocab]`, on every rank: an all-gather over tp."""
        return self._logits(self.hidden_states(tokens)).transpose(0, 1)

    def next_logits(self, tokens: Tensor, cache: KeyValueCache, last: Tensor) -> Tensor:
        """Logits of what follows token `last` (int64 `[b]`, a place in `tokens`) of every row,
        `[b, vocab]`, on every rank: an all-gather over tp.
        """
        hidden = self.hidden_states(tokens, cache=cache)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return self._logits(hidden[last, rows][None])[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.output_layer is not None, "a piece without the head has no logits"
        whole = gather_last(self.output_layer(hidden), self.output_layer.part.axis)
        # Every rank's columns are padded alike, and padding rows come after all tokens of the last
        # ranks.
        return whole[..., : self.config.vocab_size]
