"""Core as a library: a small Llama on two tensor-parallel CPU processes, with a loop of one's own.

Run by `torchrun --nproc-per-node 2 examples/simple_train_loop.py`. `core/training/trainer.py` is
the loop that does all the rest: data, checkpoints, evaluation, metrics.
"""

import torch
import torch.distributed as dist

from core.config.optimizer import OptimizerConfig
from core.config.parallel import ParallelConfig
from core.config.precision import PrecisionConfig
from core.config.transformer import TransformerConfig
from core.data_parallel.modes import make_data_parallel
from core.optim.step import OptimizerStep
from core.parallel.context import ParallelContext
from core.parallel.placement import Placement, initialize_parameters
from core.parallel.random import DropoutKey
from core.parallel.rendezvous import init_distributed
from core.parallel.sharding import declared_parameters
from core.parallel.sharing import publish_sharing
from models.llama.model import build_llama

STEPS, MICROBATCHES, BATCH, SEQUENCE = 30, 2, 8, 32

CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=128,
    vocab_size=97,
    max_position_embeddings=SEQUENCE,
    hidden_dropout=0.1,
)


def main() -> None:
    """Learn to count in steps of three, modulo the vocabulary."""
    device = init_distributed("cpu")
    # Two processes give tp 2; with four, dp 2 is what is left.
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    ctx = ParallelContext.create(parallel, device)
    model = build_llama(CONFIG, Placement(ctx, torch.float32, device))
    parameters = declared_parameters(model)
    initialize_parameters(parameters, seed=0)

    sharing = publish_sharing(parameters, ctx)  # who holds which box of which parameter
    data_parallel = make_data_parallel([model], ctx, parallel)
    optimizer = OptimizerStep(
        data_parallel, sharing, ctx, OptimizerConfig(lr=3e-3), PrecisionConfig(dtype="fp32")
    )
    tokens_per_step = MICROBATCHES * BATCH * SEQUENCE * ctx.dp.size  # over all dp ranks

    for step in range(STEPS):
        total = torch.zeros(())
        data_parallel.begin_step(MICROBATCHES)
        for i in range(MICROBATCHES):
            # Every sample has a place in the global batch, and its dropout mask follows from that.
            first = (i * ctx.dp.size + ctx.dp.rank) * BATCH
            start = torch.arange(first, first + BATCH)[:, None] + 7 * step
            text = (start + 3 * torch.arange(SEQUENCE + 1)) % CONFIG.vocab_size
            losses = model(text[:, :-1], text[:, 1:], DropoutKey(0, step, first))
            loss = losses.sum() / tokens_per_step
            loss.backward()  # accumulates into fp32 buffers; dp sums overlap the last microbatch
            total += loss.detach()
        norm = optimizer.step(lr=3e-3, weight_decay=0.1).grad_norm
        if ctx.dp.group is not None:
            dist.all_reduce(total, group=ctx.dp.group)
        if ctx.world.rank == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1:3d}  loss {total.item():.4f}  grad norm {norm.item():.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
