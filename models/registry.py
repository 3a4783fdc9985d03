"""The model families, and what each offers to what spans them: commands, presets, conversion.

Explicit, so that reading this file tells what there is, and lazy: modules are named here and
imported when used. Neither importing this module nor listing presets imports torch.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from core.config.suggestions import did_you_mean
from core.errors import ConfigError, ConversionError


@dataclass(frozen=True, kw_only=True)
class Family:
    """One folder of models."""

    name: str
    """The folder."""
    architectures: tuple[str, ...]
    """Hugging Face classes whose weights it converts, as in `architectures` of config.json."""
    config: str
    """Module with `PRESETS`, functions that return a config, by preset name; imports no torch."""
    train: str
    """Module with the task and the training entry point."""
    convert: str
    """Module with the mapping from and to Hugging Face."""

    def presets(self) -> Mapping[str, Callable[[], Any]]:
        """The family's presets by name."""
        return self.load("config").PRESETS

    def load(self, part: Literal["config", "train", "convert"]) -> ModuleType:
        """Import one of the modules named here."""
        return importlib.import_module(getattr(self, part))


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family(
                name="llama",
                architectures=(
                    "LlamaForCausalLM",
                    "MistralForCausalLM",
                    "Qwen2ForCausalLM",
                    "Qwen3ForCausalLM",
                ),
                config="models.llama.config",
                train="models.llama.train",
                convert="models.llama.convert",
            ),
            Family(
                name="gpt",
                architectures=("GPT2LMHeadModel", "GPTNeoXForCausalLM"),
                config="models.gpt.config",
                train="models.gpt.train",
                convert="models.gpt.convert",
            ),
        )
    }
)
"""Every family by name."""


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FAMILIES:
        raise ConfigError(f"there is no model family {name}: {did_you_mean(name, FAMILIES)}")
    return FAMILIES[name]


def family_for_architecture(architecture: str) -> Family:
    """The family that converts a Hugging Face class.

    Raises:
        ConversionError: none does.
    """
    known = {name: item for item in FAMILIES.values() for name in item.architectures}
    if architecture not in known:
        raise ConversionError(
            f"no model family converts the Hugging Face architecture {architecture}: "
            f"{did_you_mean(architecture, known)}"
        )
    return known[architecture]


def family_for_preset(preset: str) -> Family:
    """The family of a preset; a preset's name is its own over all families.

    Raises:
        ConfigError: no family has such a preset.
    """
    known = {name: item for item in FAMILIES.values() for name in item.presets()}
    if preset not in known:
        raise ConfigError(f"there is no preset {preset}: {did_you_mean(preset, known)}")
    return known[preset]
