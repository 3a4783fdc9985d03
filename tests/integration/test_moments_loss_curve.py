"""What rounding Adam's moments to bf16 does to the loss of a small run on real text."""

import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.data_parallel.modes import make_data_parallel
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from models.llama.config import tiny
from models.llama.model import build_llama

STEPS, WINDOW, WARMUP = 300, 20, 50
BATCH, SEQUENCE, LR = 4, 128, 1e-3


def _text() -> Tensor:
    """Bytes of some files of the standard library, as the demo has them."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    assert len(found) > 2_000_000
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def _loss_curve(text: Tensor, precision: PrecisionConfig) -> Tensor:
    """fp64 `[STEPS / WINDOW]`, means over windows."""
    ctx = ParallelContext.single()
    model = build_llama(tiny(), Placement(ctx, torch.float32, ctx.device))
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=0)
    sharing = publish_sharing(parameters, ctx)
    data_parallel = make_data_parallel([model], ctx, ParallelConfig())
    optimizer = OptimizerStep(data_parallel, sharing, ctx, OptimizerConfig(), precision)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(STEPS):
        first = torch.randint(len(text) - SEQUENCE, (BATCH,), generator=generator)
        tokens = text[first[:, None] + torch.arange(SEQUENCE + 1)].long()
        data_parallel.begin_step(1)
        loss = model(tokens[:, :-1], tokens[:, 1:], None).mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(LR * min(1.0, (step + 1) / WARMUP) * (1.0 - 0.9 * step / STEPS), 0.1)
    return torch.tensor(losses, dtype=torch.float64).view(-1, WINDOW).mean(1)


@pytest.mark.full
def test_bf16_moments_follow_the_fp32_loss_curve() -> None:
    """Within 0.5 % over 300 steps of 512 tokens, in means over 20 steps."""
    text = _text()
    wide = _loss_curve(text, PrecisionConfig(dtype="fp32"))
    narrow = _loss_curve(text, PrecisionConfig(dtype="fp32", moments="bf16"))
    assert wide[-1] < 0.6 * wide[0]
    off = (narrow / wide - 1.0).abs().max().item()
    sys.stdout.write(f"bf16 moments: loss off by at most {off:.2%}, {wide[-1]:.4f} at the end\n")
    assert 0.0 < off < 0.005
