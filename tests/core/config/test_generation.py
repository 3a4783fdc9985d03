import dataclasses
from typing import Any

import pytest

from core.config.generation import GenerationConfig, validate_generation
from core.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "--max-tokens is 0: it must be at least 1"),
        ({"top_k": -1, "temperature": 1.0}, "--top-k is -1"),
        ({"seed": -2}, "--seed is -2"),
        ({"temperature": -0.5}, "--temperature is -0.5"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p is 0.0"),
        ({"top_p": 0.9}, "--top-p 0.9 does nothing with --temperature 0"),
        ({"top_k": 5}, "--top-k 5 does nothing"),
        ({"seed": 5}, "--seed 5 does nothing"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_generation(GenerationConfig(**options))


def test_accepted() -> None:
    validate_generation(GenerationConfig())
    sampling = GenerationConfig(temperature=0.8, top_k=50, top_p=0.95, seed=1)
    validate_generation(sampling)
    validate_generation(dataclasses.replace(sampling, top_k=0))
