"""Logits of a native model against those of `transformers`, from the same folder and in fp32.

Names, shapes and a bit-exact round trip prove nothing about meaning: gate and up exchanged in both
directions pass all of them. Only running the model does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converters.native import check_source
from converters.rules import Family, LogitsProbe
from converters.source import Source, load_into, open_source
from core.config.parallel import ParallelConfig
from core.errors import ConfigError, ConversionError
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerError, WorkerPool

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest value."""

_HOUR = 3600.0


@dataclass
class Trace:
    """What a model computed: the input of the first layer, each layer's output, the logits."""

    hidden: list[Tensor] = field(default_factory=list)
    """[b, s, h] each: the embedding, then one per layer."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """[b, s, vocabulary]."""


@dataclass(frozen=True)
class Report:
    """How far two models are apart."""

    architecture: str
    tp: int
    largest_difference: float
    largest_logit: float
    diverging: str | None
    """The first place where hidden states differ by more than the tolerance."""

    @property
    def passed(self) -> bool:
        """Whether the logits agree. Not a number never does."""
        return self.largest_difference <= TOLERANCE * self.largest_logit

    def __str__(self) -> str:
        text = (
            f"{self.architecture} at tp {self.tp}: largest difference of logits "
            f"{self.largest_difference:.2e}, largest logit {self.largest_logit:.4g} (ratio "
            f"{self.largest_difference / max(self.largest_logit, 1e-30):.1e}, limit "
            f"{TOLERANCE:.0e})"
        )
        return text if self.diverging is None else f"{text}; first to differ: {self.diverging}"


def verify(
    path: Path,
    family: Family | None = None,
    *,
    tp: int = 1,
    batch: int = 2,
    length: int = 64,
    pool: WorkerPool | None = None,
) -> Report:
    """Run a folder's weights here and in `transformers` on the same random tokens.

    Args:
        path: Hugging Face folder.
        family: the table to read it with; by default the one of its architecture.
        tp: tensor parallel size; above 1, that many processes are started on the CPU.
        batch: sequences.
        length: tokens in each.
        pool: processes to use, where there are some already.

    Raises:
        ConversionError: the folder cannot be read, here or by `transformers`, or a process fails.
        ConfigError: the model cannot be cut over `tp`, or has fewer positions than `length`.
    """
    source = check_source(path, tp, family)
    config = source.config
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise ConfigError(f"--length {length} is above the {longest} positions of {path}: lower it")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    if tp == 1:
        own = native_trace(path, source.family, ParallelContext.single(), tokens)
    else:
        workers = pool or WorkerPool()
        try:
            name = source.family.name
            own = workers.run(_worker, tp, path, name, tp, tokens, timeout=_HOUR)[0]
        except WorkerError as error:
            # What a process can do wrong is in the last line of its traceback.
            reason = str(error).strip().splitlines()[-1]
            raise ConversionError(
                f"{path} could not be run on {tp} processes ({reason}): try a smaller --tp, or "
                "free memory"
            ) from error
        finally:
            if pool is None:
                workers.close()
    return _compare(source.architecture, tp, own, hf_trace(path, source, tokens))


def _probe(family: Family) -> LogitsProbe:
    if family.probe is None:
        raise ConversionError(f"the family {family.name} says nothing of how to verify its logits")
    return family.probe


def _worker(path: Path, family_name: str, tp: int, tokens: Tensor) -> Trace:
    from converters.source import family_named

    ctx = ParallelContext.create(ParallelConfig(tp=tp), torch.device("cpu"))
    return native_trace(path, family_named(family_name), ctx, tokens)


@torch.no_grad()
def native_trace(path: Path, family: Family, ctx: ParallelContext, tokens: Tensor) -> Trace:
    """Load this rank's boxes in fp32 and run them. Communicates over tp."""
    source = open_source(path, family)
    probe = _probe(family)
    model = family.build_model(source.config, Placement(ctx, torch.float32, ctx.device))
    load_into(declared_parameters(model), source)
    model.eval()
    trace = Trace()
    layers = model.get_submodule(probe.native_layers)
    with _Hooks(layers, lambda hidden: trace.hidden.append(hidden.transpose(0, 1).contiguous())):
        trace.logits = probe.logits(model, tokens)
    return trace


@torch.no_grad()
def hf_trace(path: Path, source: Source, tokens: Tensor) -> Trace:
    """Run the folder in `transformers`, in fp32 with its plain attention.

    Raises:
        ConversionError: `transformers` cannot load it, or finds tensors missing or unexpected.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as reason:
        cause = " ".join(str(reason).split())
        raise ConversionError(f"transformers cannot load {path}: {cause}") from reason
    check_loading_info(path, info)
    model.eval()
    trace = Trace()
    layers = model.get_submodule(_probe(source.family).hf_layers[source.architecture])
    with _Hooks(layers, lambda hidden: trace.hidden.append(hidden.clone())):
        trace.logits = model(input_ids=tokens, use_cache=False).logits
    return trace


def check_loading_info(path: Path, info: Mapping[str, Any]) -> None:
    """Check that `transformers` filled its whole model.

    Raises:
        ConversionError: tensors were missing or of another shape.
    """
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            raise ConversionError(
                f"transformers reports {what.replace('_', ' ')} in {path}: {sorted(info[what])[:4]}"
            )


class _Hooks:
    """Passes on what enters the first of some layers and what leaves each, in order."""

    def __init__(self, layers: nn.Module, record: Callable[[Tensor], None]) -> None:
        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record(args[0] if args else kwargs["hidden_states"])

        def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            record(output[0] if isinstance(output, tuple) else output)

        children = list(layers.children())
        self._handles = [children[0].register_forward_pre_hook(entering, with_kwargs=True)]
        self._handles += [child.register_forward_hook(leaving) for child in children]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def _compare(architecture: str, tp: int, own: Trace, other: Trace) -> Report:
    diverging = None
    for index, (a, b) in enumerate(zip(own.hidden, other.hidden, strict=True)):
        if not (a - b).abs().max() <= TOLERANCE * b.abs().max():  # also where one is not a number
            diverging = f"the output of layer {index - 1}" if index else "the embedding"
            break
    report = Report(
        architecture,
        tp,
        (own.logits - other.logits).abs().max().item(),
        other.logits.abs().max().item(),
        diverging,
    )
    if report.passed or diverging is not None:
        return report
    return Report(
        architecture,
        tp,
        report.largest_difference,
        report.largest_logit,
        "the final norm or the head",
    )
