"""How text is generated."""

from dataclasses import dataclass

from core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Choice of the next token, and when to end."""

    max_tokens: int = 128
    """Tokens that are generated at most for a prompt."""
    temperature: float = 0.0
    """Logits are divided by it before a token is drawn; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among this many of the most likely tokens only; 0: among all."""
    top_p: float = 1.0
    """Draw among the most likely tokens only, as few as have this probability together (Holtzman et
    al., "The curious case of neural text degeneration", 2020)."""
    seed: int = 1234
    """Of the draws: the same seed draws the same tokens, at every tp."""


def _numbers_are_possible(config: GenerationConfig) -> None:
    for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}: it must be at least "
                f"{least}"
            )
    if not 0.0 <= config.temperature < float("inf"):
        raise ConfigError(
            f"--temperature is {config.temperature}: it must be finite and at least 0"
        )
    if not 0.0 < config.top_p <= 1.0:
        raise ConfigError(f"--top-p is {config.top_p}: it must be above 0 and at most 1")


def _draws_are_made(config: GenerationConfig) -> None:
    default = GenerationConfig()
    if config.temperature > 0.0:
        return
    for name in ("top_k", "top_p", "seed"):
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(config, name)} does nothing with "
                "--temperature 0, which always takes the most likely token: raise the temperature, "
                "or leave it out"
            )


GENERATION_RULES = (_numbers_are_possible, _draws_are_made)


def validate_generation(config: GenerationConfig) -> None:
    """Apply every rule.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    for rule in GENERATION_RULES:
        rule(config)
