"""Which stage holds which piece of a model that is cut for a pipeline.

A model is cut into `stages * chunks` *pieces*, numbered in the order that data passes them. Each
stage holds one piece per *chunk* (virtual stage).
"""

from dataclasses import dataclass
from typing import Literal

from core.errors import ConfigError


@dataclass(frozen=True)
class StageMap:
    """Pieces to stages and back.

    Raises:
        ConfigError: stages or chunks below 1.
    """

    stages: int
    """Stages, each on its own ranks."""
    chunks: int = 1
    """Pieces per stage."""
    shape: Literal["loop", "v"] = "loop"
    """loop: every chunk runs from the first stage to the last (Narayanan et al., 2021); v: odd
    chunks run back, so that a V's two ends lie on the first stage (Qi et al., 2024)."""

    def __post_init__(self) -> None:
        for name in ("stages", "chunks"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"a pipeline of {getattr(self, name)} {name} cannot be: use at least 1"
                )

    @property
    def pieces(self) -> int:
        """How many pieces the model is cut into."""
        return self.stages * self.chunks

    def stage(self, piece: int) -> int:
        """The stage that holds a piece."""
        place = piece % self.stages
        return self.stages - 1 - place if self._runs_back(self.chunk(piece)) else place

    def chunk(self, piece: int) -> int:
        """Which of its stage's chunks a piece is."""
        return piece // self.stages

    def piece(self, stage: int, chunk: int) -> int:
        """The piece that is a chunk of a stage."""
        place = self.stages - 1 - stage if self._runs_back(chunk) else stage
        return chunk * self.stages + place

    def _runs_back(self, chunk: int) -> bool:
        return self.shape == "v" and chunk % 2 == 1
