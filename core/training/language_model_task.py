"""The task of every decoder-only language model: next-token loss over `.bin/.idx` text
or over the answers of chats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from core.backends.chosen import chosen_backend
from core.backends.local import LocalSpecProvider
from core.backends.provider import BackendSpecProvider
from core.config.data import DataConfig
from core.config.parallel import RecomputeConfig
from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.transformer import (
    TransformerConfig,
    validate_attention,
    validate_layout,
    validate_length,
    validate_transformer,
)
from core.data.builder import Datasets, build_datasets
from core.data.loader import Batch
from core.data.tokenizers import Tokenizer
from core.kernels.chosen_attention import attention_lines
from core.kernels.masked_attention import Documents
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.random import DropoutKey
from core.parallel.sharding import DeclaredParameter
from core.pipeline.costs import Part, language_model_parts
from core.training.task import LossOutput
from core.transformer.language_model import LanguageModel

BuildLanguageModel: TypeAlias = Callable[
    [TransformerConfig, Placement, RecomputeConfig, BackendSpecProvider], LanguageModel
]
"""What a family's `model.py` offers: the model, its parameters not yet initialised."""

ImportWeights: TypeAlias = Callable[
    [Path, TransformerConfig, Mapping[str, DeclaredParameter]], Mapping[str, Any]
]
"""What a family's `convert.py` offers: it fills the parameters, and returns what checkpoints
remember of the source."""


@dataclass(frozen=True)
class LanguageModelTask:
    """A `TrainTask`; a family gives its name, how to build its model and how to import weights."""

    family: str
    model_config: TransformerConfig
    build: BuildLanguageModel
    importer: ImportWeights
    recompute: RecomputeConfig
    backend: BackendSpecProvider
    label_smoothing: float = 0.0
    """In training only."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats, on which it depends what layers cost."""

    @classmethod
    def of(
        cls,
        family: str,
        config: RunConfig[TransformerConfig],
        *,
        build: BuildLanguageModel,
        importer: ImportWeights,
    ) -> "LanguageModelTask":
        """The task that a run asks of a family.

        Raises:
            ConfigError: the backend is not installed.
        """
        model = config.model
        return cls(
            family,
            model,
            build,
            importer,
            config.parallel.recompute,
            chosen_backend(config.backend, config.precision, config.parallel, model.num_layers),
            config.train.label_smoothing,
            config.precision,
        )

    def validate(self, ctx: ParallelContext, data: DataConfig) -> None:
        """Check that the architecture is sound and fits layout, data and device.

        Raises:
            ConfigError: it does not.
        """
        validate_transformer(self.model_config)
        validate_length(self.model_config, data.seq_length)
        validate_layout(
            self.model_config,
            ctx.tp.size,
            sequence_parallel=ctx.sequence_parallel,
            seq_length=data.seq_length,
        )
        validate_attention(
            self.model_config,
            ctx.device.type,
            seq_length=data.seq_length,
            separate_documents=data.separate_documents,
        )

    def parts(self, data: DataConfig) -> Sequence[Part]:
        """Embedding, layers, head."""
        return language_model_parts(
            self.model_config,
            data.seq_length,
            recompute=self.recompute,
            precision=self.precision,
        )

    def payload(
        self, ctx: ParallelContext, data: DataConfig, micro_batch_size: int, part: int
    ) -> Mapping[str, tuple[int, ...]]:
        """Hidden states."""
        length = data.seq_length // (ctx.tp.size if ctx.sequence_parallel else 1)
        return {"hidden": (length, micro_batch_size, self.model_config.hidden_size)}

    def build_model(self, place: Placement) -> nn.Module:
        """The model or a piece of it, its parameters not yet initialised."""
        return self.build(self.model_config, place, self.recompute, self.backend)

    def flops_per_token(self, seq_length: int, *, causal: bool) -> float:
        """Model FLOPs of one token's forward and backward."""
        return self.model_config.flops_per_token(seq_length, causal=causal)

    def describe(self, ctx: ParallelContext, data: DataConfig, dtype: torch.dtype) -> list[str]:
        """Backend, and which attention kernel the local one runs; a slow one is logged as a
        warning.
        """
        backend = self.backend.describe()
        if not isinstance(self.backend, LocalSpecProvider):
            return [backend]  # which chooses by itself
        return [backend, *attention_lines(self.model_config, data, ctx, dtype)]

    def make_datasets(
        self,
        data: DataConfig,
        tokenizer: Tokenizer | None,
        num_samples: Sequence[int],
        seed: int,
    ) -> Datasets:
        """Training, validation and test text; see `build_datasets`."""
        return build_datasets(
            data,
            vocab_size=self.model_config.vocab_size,
            # Not every tokenizer has one, and nothing else needs it.
            eod=tokenizer.eod if tokenizer is not None and data.mask_eod_loss else None,
            num_samples=num_samples,
            seed=seed,
            tokenizer=tokenizer,
        )

    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that count, of a batch on the host."""
        return {"lm": int(batch.loss_mask.sum())}

    def forward_step(
        self, chunk: nn.Module, batch: Batch, key: DropoutKey | None, received: Mapping[str, Tensor]
    ) -> LossOutput | Mapping[str, Tensor]:
        """Sum of the next-token cross entropy over the tokens that count, or hidden states."""
        smoothing = 0.0 if key is None else self.label_smoothing
        documents = None
        if batch.cu_seqlens is not None:
            documents = Documents.between(batch.cu_seqlens, batch.tokens.shape[1])
        hidden = received.get("hidden")
        losses = chunk(batch.tokens, batch.labels, key, smoothing, hidden, documents)
        if chunk.output_layer is None:
            return {"hidden": losses}
        # Not a product: a loss that is not finite at a token that does not count must not spread.
        return LossOutput({"lm": torch.where(batch.loss_mask, losses, 0.0).sum()})

    def import_weights(
        self, source: Path, parameters: Mapping[str, DeclaredParameter]
    ) -> Mapping[str, Any]:
        """Fill the parameters from a Hugging Face folder; see the family's `convert.py`."""
        return self.importer(source, self.model_config, parameters)
