"""The mapping language: how the tensors of one model family lie in a Hugging Face checkpoint and
in a native one.

A table of `Rule`s is read left to right by import and right to left by export, so the two cannot
drift apart. It speaks of whole (global) tensors only: how they are cut over ranks is declared by
the layers (`core.parallel.sharding`), and `plan.py` brings the two together. Names hold
placeholders such as `{layer}`, which run over `Family.sizes["layer"]`; sizes are numbers or names
of entries of `Family.sizes`.

Nothing here imports torch, so that a command line can list families at once.
"""

import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from core.errors import ConversionError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core.parallel.placement import Placement

Size = int | str
"""A number, or the name of one in `Family.sizes`."""

Condition = Callable[[Any, Mapping[str, int]], bool]
"""Whether a rule holds, from the model config and the values of its placeholders."""


def always(config: Any, at: Mapping[str, int]) -> bool:
    """The condition of rules that hold for every model of the family."""
    return True


def has(flag: Callable[[Any], object]) -> Condition:
    """The condition of rules that hold for the models whose config has something."""
    return lambda config, at: bool(flag(config))


@dataclass(frozen=True)
class Block:
    """Rows of a native tensor that are rows of one Hugging Face tensor.

    `count` units of `unit` rows: the first unit begins at row `start` of the Hugging Face tensor,
    and each next one `pitch` rows further on (a fused qkv may be laid out head by head).
    """

    hf: str | tuple[str, ...]
    """Name on disk, or its variants: the one that is there is used, and the first is written when
    no source is remembered."""
    count: Size
    unit: Size = 1
    start: Size = 0
    pitch: Size = 0
    """0: units follow one another."""

    @property
    def variants(self) -> tuple[str, ...]:
        """All names that this block may have on disk."""
        return (self.hf,) if isinstance(self.hf, str) else self.hf


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One native tensor: its rows are the rows of the blocks, in order."""

    native: str
    """Global name, with placeholders; layer numbers are global."""
    blocks: tuple[Block, ...]
    other: tuple[Size, ...] = ()
    """Sizes of all dimensions but the first."""
    transposed: bool = False
    """The Hugging Face tensor is `[in, out]` (`Conv1D`), and the rows of its blocks are columns.
    Said, never guessed: a square weight looks the same both ways."""
    when: Condition = always
    """Whether the model has this tensor."""
    keep_float32: bool = False
    """A tensor that loses accuracy in 16 bits (SSM decay, router bias): an export in another
    format leaves it in its own."""
    optional: bool = False
    """May be absent on disk: then the model must not have it either."""

    def instances(self, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """Every assignment of the placeholders of the native name."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.native) if name]
        for values in product(*(range(sizes[name]) for name in names)):
            yield dict(zip(names, values, strict=True))


@dataclass(frozen=True)
class Ignore:
    """Tensors on disk that a model does not need, and why."""

    pattern: str
    """Regular expression for the whole name."""
    reason: str
    when: Condition = always


@dataclass(frozen=True, kw_only=True)
class Head:
    """Names on disk of the embedding table and of the head that may be tied to it, each with its
    variants.
    """

    embedding: tuple[str, ...]
    output: tuple[str, ...]
    field: str = "tie_embeddings"
    """Field of the model config that says whether they are one."""


@dataclass(frozen=True, kw_only=True)
class LogitsProbe:
    """What `verify` needs to compare a family's model with that of `transformers`."""

    native_layers: str
    """Path of the layers in the native model, as in `decoder.layers`."""
    hf_layers: Mapping[str, str]
    """Path of the layers in the model of `transformers`, by its class."""
    logits: "Callable[[nn.Module, Tensor], Tensor]"
    """Model in evaluation mode and tokens [b, s] to the logits [b, s, vocabulary]."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """All that the converters know of one folder under `models`."""

    name: str
    architectures: tuple[str, ...]
    """Hugging Face classes, in the order in which a model without a source tries them."""
    rules: tuple[Rule, ...]
    ignore: tuple[Ignore, ...]
    sizes: Callable[[Any], Mapping[str, int]]
    """Model config to the numbers that the table names; `vocab` is also what a tokenizer must fit
    in."""
    to_native: Callable[[Mapping[str, Any]], Any]
    """config.json to the model config; raises ConversionError for what cannot be mapped."""
    to_hf: Callable[[Any, str], dict[str, Any]]
    """Model config and Hugging Face class to the entries of config.json that follow from it."""
    config_class: type[Any]
    """The dataclass of model configs."""
    canonical: Callable[[Any], Any]
    """The same architecture with defaults written out, so that two configs can be compared."""
    incidental: tuple[str, ...]
    """Fields of the model config that do not change what a trained model computes: an export may
    lose them, and `--init-from` need not match them."""
    build_model: "Callable[[Any, Placement], nn.Module]"
    head: Head | None = None
    probe: LogitsProbe | None = None

    def ignored(self, name: str, config: Any) -> str | None:
        """The reason for which a tensor on disk is left out, or None where there is none."""
        for rule in self.ignore:
            if rule.when(config, {}) and re.fullmatch(rule.pattern, name):
                return rule.reason
        return None


def resolve(size: Size, sizes: Mapping[str, int]) -> int:
    """The number that a size stands for."""
    return sizes[size] if isinstance(size, str) else size


def choose_variant(block: Block, at: Mapping[str, int], disk: Collection[str] | None) -> str:
    """The name of a block on disk: the first variant that is there, else the first of all."""
    names = [variant.format_map(at) for variant in block.variants]
    return next((name for name in names if disk is not None and name in disk), names[0])


def architecture_of(hf_config: Mapping[str, Any]) -> str:
    """The model class that a config.json names.

    Raises:
        ConversionError: none or several.
    """
    names = hf_config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1:
        raise ConversionError(
            f"config.json has architectures {names}: it must name one model class, such as "
            '["LlamaForCausalLM"]'
        )
    return str(names[0])
