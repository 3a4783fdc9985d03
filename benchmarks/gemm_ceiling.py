"""The rate that a work's own matrix products sustain: what its step could reach were it nothing
else.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.workloads import Workload
from core.config.transformer import TransformerConfig


@dataclass(frozen=True)
class Product:
    """A weight `[o, i]`, and how often it is multiplied with a microbatch's `[t, i]`."""

    name: str
    outputs: int
    inputs: int
    count: int


def products(config: TransformerConfig) -> list[Product]:
    """The weights of a model by shape; the embedding look-up is no product."""
    hidden, dim, layers = config.hidden_size, config.kv_channels, config.num_layers
    queries = config.num_attention_heads * dim
    inner = config.ffn_hidden_size
    return [
        Product("qkv", queries + 2 * config.kv_heads * dim, hidden, layers),
        Product("proj", hidden, queries, layers),
        Product("fc1", (2 if config.gated_mlp else 1) * inner, hidden, layers),
        Product("fc2", hidden, inner, layers),
        Product("head", config.vocab_size, hidden, 1),
    ]


def ceiling(
    work: Workload, config: TransformerConfig, device: torch.device, seconds: float
) -> tuple[float, dict[str, float]]:
    """Sustained rate of forward, input-gradient and weight-gradient products, the last accumulated
    in fp32, on normally distributed numbers (zeros run faster).

    Args:
        work: gives the tokens of a microbatch.
        config: gives the shapes.
        device: where to run.
        seconds: how long each product runs.

    Returns:
        TFLOP/s weighted by the FLOPs that the model has of each, and TFLOP/s of each.
    """
    tokens = work.micro_batch_size * work.seq_length
    rates: dict[str, float] = {}
    flops = spent = 0.0
    for product in products(config):
        one = 2.0 * tokens * product.outputs * product.inputs
        for part, run in _calls(product, tokens, device).items():
            took = _seconds_per_call(run, seconds, device)
            rates[f"{product.name} {part}"] = one / took / 1e12
            flops += one * product.count
            spent += took * product.count
    return flops / spent / 1e12, rates


def _calls(product: Product, tokens: int, device: torch.device) -> dict[str, Callable[[], object]]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, dy = normal(tokens, product.inputs), normal(tokens, product.outputs)
    weight = normal(product.outputs, product.inputs)
    out, dx = torch.empty_like(dy), torch.empty_like(x)
    total = torch.zeros(weight.shape, device=device)

    def weight_gradient() -> None:
        if device.type == "cuda":
            torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)
        else:
            total.add_(dy.t() @ x)

    return {
        "forward": lambda: torch.mm(x, weight.t(), out=out),
        "dgrad": lambda: torch.mm(dy, weight, out=dx),
        "wgrad": weight_gradient,
    }


def _seconds_per_call(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Mean time of a call over about `seconds`, after as many calls as tell how long one takes."""

    def timed(calls: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        return (time.perf_counter() - start) / calls

    timed(2)
    return timed(max(3, round(seconds / timed(5))))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
