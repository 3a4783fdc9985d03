"""What a comparison finds out, as it goes from process to process. Imports no torch."""

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timed:
    """What was measured of one contestant."""

    name: str
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step before the clock started."""
    token_losses: list[float] = field(default_factory=list)
    """Of the first tokens of the first samples, before the first step."""
    blocks: list[list[float]] = field(default_factory=list)
    """Seconds of every step, by block."""
    clocks: list[str] = field(default_factory=list)
    """Clock and power of the GPU at the end of each block."""
    peak_gib: float = 0.0
    """Most memory allocated in its own steps, less what was allocated before it was built."""
    setup_seconds: float = 0.0
    """From its construction to the end of its warm-up, compilation included."""

    @property
    def seconds(self) -> list[float]:
        """Of every step."""
        return [seconds for block in self.blocks for seconds in block]

    @property
    def median(self) -> float:
        """Seconds of the median step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest - fastest block median) / median: how far the clocks drifted."""
        medians = [statistics.median(block) for block in self.blocks]
        return (max(medians) - min(medians)) / self.median


def ratios(first: Timed, second: Timed) -> list[float]:
    """How many times as fast the first is, for each pair of blocks that ran side by side."""
    pairs = zip(first.blocks, second.blocks, strict=False)
    return [statistics.median(b) / statistics.median(a) for a, b in pairs]


@dataclass
class Outcome:
    """What came of a pair."""

    work: str
    contestants: tuple[str, ...]
    timed: list[Timed] = field(default_factory=list)
    refused: str = ""
    """Why nothing was timed."""
    in_turns: bool = False
    """Whether each had the device alone, one after the other."""
    ceiling: float = 0.0
    """TFLOP/s that the work's matrix products sustain in bf16; 0: not measured."""
    ceiling_parts: dict[str, float] = field(default_factory=dict)
    """The same of each product."""
    machine: str = ""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Outcome":
        """What `dataclasses.asdict` turned into plain values."""
        return cls(**{**values, "timed": [Timed(**one) for one in values["timed"]]})
