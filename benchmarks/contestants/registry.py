"""Who is compared, by name. Nothing here imports torch: names are checked before a process starts.

A contestant is an object with one method, `step`: forward and backward of a step's microbatches,
clipping to a norm of 1, AdamW, and zeroed gradients. All read the token stream of
`benchmarks.train_step.random_tokens` and start from the weights of `initial_weights`; products and
activations are bf16; summed gradients, masters and moments fp32.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from core.config.precision import PrecisionConfig
from core.config.run import RunConfig
from core.config.suggestions import did_you_mean
from core.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from benchmarks.workloads import Workload
    from core.config.transformer import TransformerConfig

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0
BETAS, EPSILON = (0.9, 0.95), 1e-8
SEED = 1
"""Of the initial weights."""
PARITY_STEPS = 3
"""First steps whose losses must agree before anything is timed."""


class Contestant(Protocol):
    """One implementation of the training step, with its state on the device."""

    def step(self) -> "Tensor":
        """Run the next step; returns the mean loss over its tokens, on the device."""

    def token_losses(self) -> "Tensor":
        """Losses `[b, s]` of the first microbatch of all, with the weights as they are. Computed
        with gradients on and thrown away, so that nothing is compiled for it alone.
        """


@dataclass(frozen=True)
class Entry:
    """How a contestant is made."""

    kind: Literal["ours", "hugging_face", "megatron"]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """ours: values of `--backend` and `--precision.fp8`. hugging_face: `mode`, eager, compile or
    tuned. megatron: `fp8`, a recipe in its own words, and `spec`, whose layers it is made of."""

    @property
    def fp8(self) -> bool:
        """Whether GEMMs of the layers are in FP8."""
        return self.options.get("fp8", "none") != "none"


ENTRIES: Mapping[str, Entry] = MappingProxyType(
    {
        "ours": Entry("ours"),
        "ours-fp8": Entry("ours", {"fp8": "current"}),
        "ours-fp8-rowwise": Entry("ours", {"fp8": "rowwise"}),
        "ours-te": Entry("ours", {"backend": "transformer_engine"}),
        "ours-te-fp8": Entry("ours", {"backend": "transformer_engine", "fp8": "delayed"}),
        "ours-te-fp8-current": Entry("ours", {"backend": "transformer_engine", "fp8": "current"}),
        "hf-eager": Entry("hugging_face", {"mode": "eager"}),
        "hf-compile": Entry("hugging_face", {"mode": "compile"}),
        "hf-tuned": Entry("hugging_face", {"mode": "tuned"}),
        "megatron": Entry("megatron", {"spec": "transformer_engine"}),
        "megatron-fp8-delayed": Entry("megatron", {"spec": "transformer_engine", "fp8": "delayed"}),
        "megatron-fp8-current": Entry(
            "megatron", {"spec": "transformer_engine", "fp8": "tensorwise"}
        ),
        "megatron-local": Entry("megatron", {"spec": "local"}),
    }
)
"""Every contestant by name."""


def entry(name: str) -> Entry:
    """The contestant of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in ENTRIES:
        raise ConfigError(f"there is no contestant {name}: {did_you_mean(name, ENTRIES)}")
    return ENTRIES[name]


def unavailable(name: str) -> str | None:
    """Why a contestant cannot run here, or None where it can."""
    chosen = entry(name)
    needed = {"hugging_face": ("transformers",), "megatron": ("megatron.core",)}
    modules = needed.get(chosen.kind, ())
    if "transformer_engine" in chosen.options.values():
        modules = (*modules, "transformer_engine")
    for module in modules:
        if not _found(module):
            return f"{module} is not installed"
    if chosen.kind == "ours":
        for option, config in (("backend", RunConfig), ("fp8", PrecisionConfig)):
            if option in chosen.options and not _has(config, option):
                return f"there is no option {option} in {config.__name__}"
    return None


def with_option(config: Any, name: str, value: str) -> Any:
    """A configuration with one option changed, if it has that option.

    Raises:
        ConfigError: it has not.
    """
    if not _has(type(config), name):
        raise ConfigError(f"{type(config).__name__} has no option {name}, to be set to {value}")
    return dataclasses.replace(config, **{name: value})


def build(
    name: str, work: "Workload", config: "TransformerConfig", device: "torch.device"
) -> Contestant:
    """Make a contestant; its memory on the device is taken here and in its first steps."""
    chosen = entry(name)
    options = dict(chosen.options)
    if chosen.kind == "ours":
        from benchmarks.contestants.ours import Ours

        return Ours(work, config, device, options)
    if chosen.kind == "hugging_face":
        from benchmarks.contestants.hugging_face import HuggingFace, TunedHuggingFace

        if options["mode"] == "tuned":
            return TunedHuggingFace(work, config, device)
        return HuggingFace(work, config, device, compiled=options["mode"] == "compile")
    from benchmarks.contestants.megatron import Megatron

    return Megatron(work, config, device, spec=options["spec"], fp8=options.get("fp8"))


def _has(config: type[Any], option: str) -> bool:
    return option in {field.name for field in dataclasses.fields(config)}


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is in
        return False
