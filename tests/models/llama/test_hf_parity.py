"""Logits of every Hugging Face class and rotary variant, at several layouts, against transformers
in fp32."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from converters.source import load_into, open_source
from core.config.parallel import ParallelConfig
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement
from core.parallel.sharding import declared_parameters
from core.testing.distributed import WorkerPool
from core.testing.hf_models import LLAMA, save_hf_model, tiny_hf_model
from models.llama.convert import FAMILY
from models.llama.model import build_llama

LIMIT = 1e-4
"""Of the largest logit."""


def _tokens() -> Tensor:
    return torch.randint(0, 67, (2, 48), generator=torch.Generator().manual_seed(9))


def _logits(folders: list[Path], tp: int, sequence_parallel: bool) -> list[Tensor]:
    """Logits of every folder's model at a layout."""
    config = ParallelConfig(tp=tp, sequence_parallel=sequence_parallel)
    ctx = ParallelContext.create(config, torch.device("cpu"))
    found = []
    for folder in folders:
        source = open_source(folder, FAMILY)
        model = build_llama(source.config, Placement(ctx, torch.float32, ctx.device)).eval()
        load_into(declared_parameters(model), source, source.config)
        with torch.no_grad():
            found.append(model.logits(_tokens()).clone())
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """Every variant: its folder, and the logits of transformers."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for variant in LLAMA:
        with torch.no_grad():
            logits = tiny_hf_model(variant)(_tokens()).logits
        found[variant] = (save_hf_model(root / variant, variant), logits)
    return found


@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True), (8, False)]
)
def test_logits_are_those_of_transformers(
    pool: WorkerPool, saved: dict[str, tuple[Path, Tensor]], tp: int, sequence_parallel: bool
) -> None:
    folders = [folder for folder, _ in saved.values()]
    ranks = pool.run(_logits, tp, folders, tp, sequence_parallel)
    for place, (variant, (_, expected)) in enumerate(saved.items()):
        for rank, found in enumerate(ranks):
            difference = (found[place] - expected).abs().max().item()
            assert difference <= LIMIT * expected.abs().max().item(), f"{variant}, rank {rank}"
