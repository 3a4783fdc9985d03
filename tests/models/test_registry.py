import importlib.util
import subprocess
import sys
from collections import Counter

import pytest

from core.errors import ConfigError, ConversionError
from models.registry import FAMILIES, family, family_for_architecture, family_for_preset


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"],
)
def test_llama_converts_its_classes(architecture: str) -> None:
    assert family_for_architecture(architecture) is family("llama")


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "GPTNeoXForCausalLM"])
def test_gpt_converts_its_classes(architecture: str) -> None:
    assert family_for_architecture(architecture) is family("gpt")


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConversionError, match=r"architecture LlamaForCasualLM: .*LlamaForCausalLM"):
        family_for_architecture("LlamaForCasualLM")


def test_foreign_architecture_lists_all() -> None:
    with pytest.raises(ConversionError, match=r"choose one of GPT2LMHeadModel, .*Llama.*Qwen3"):
        family_for_architecture("Whisper")


def test_presets_have_one_family() -> None:
    names = Counter(name for item in FAMILIES.values() for name in item.presets())
    assert [name for name, count in names.items() if count > 1] == []
    assert family_for_preset("llama3.2-1b") is family("llama")
    assert family_for_preset("gpt2-xl") is family("gpt")


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no preset lama3.2-1b: perhaps you meant llama3.2-1b"):
        family_for_preset("lama3.2-1b")


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no model family lama: perhaps you meant llama"):
        family("lama")


@pytest.mark.parametrize("name", FAMILIES)
def test_named_modules_exist(name: str) -> None:
    item = FAMILIES[name]
    for module in (item.config, item.train, item.convert):
        assert importlib.util.find_spec(module) is not None, module


def test_listing_presets_does_not_import_torch() -> None:
    program = (
        "import sys; from models.registry import FAMILIES; "
        "print([n for f in FAMILIES.values() for n in f.presets()]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
