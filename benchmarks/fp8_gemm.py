"""FP8 products of a linear layer beside bf16, at the shapes of one Llama-3-8B layer, and the
kernels that quantise for them beside the copy rate. Says which way to take; a minute on one GPU.

`python benchmarks/fp8_gemm.py`
"""

import itertools
import statistics
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import tyro
from torch import Tensor

from core.errors import ConfigError
from core.kernels.cublaslt import adder
from core.kernels.fp8 import (
    E4M3,
    E5M2,
    Fp8Matrix,
    add_rounded,
    add_scaled_product,
    flip,
    quantize,
    quantize_both,
    scale_of_whole,
    scaled_product,
    scales_of_columns,
    scales_of_rows,
)

SHAPES = {"qkv": (4096, 6144), "proj": (4096, 4096), "fc1": (4096, 28672), "fc2": (14336, 4096)}
"""Input and output width."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured."""

    tokens: int = 8192
    """Tokens of a microbatch."""
    repeats: int = 12
    """Measurements, of which the median counts."""
    calls: int = 4
    """Calls in a measurement."""


@dataclass
class Bench:
    """Times functions and collects lines of the table."""

    work: Work
    lines: list[str] = field(default_factory=list)
    copy_rate: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    """Of the seconds of lines of one name: over all shapes, what a layer takes."""

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of one call; inputs are larger than the cache or cold anyway."""
        for _ in range(3):
            run()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.work.repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(self.work.calls):
                run()
            mark.record()
        torch.cuda.synchronize()
        each = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        return statistics.median(each) / 1e3 / self.work.calls

    def rate(self, name: str, flops: float, run: Callable[[], object]) -> None:
        """A line of time and TFLOP/s."""
        seconds = self.seconds(run)
        self.sums[name] = self.sums.get(name, 0.0) + seconds
        self.lines.append(
            f"  {name:38} {seconds * 1e6:8.0f} us {flops / seconds / 1e12:7.0f} TFLOP/s"
        )

    def traffic(self, name: str, size: float, run: Callable[[], object]) -> None:
        """A line of time, GB/s of the least traffic and its share of the copy rate."""
        seconds = self.seconds(run)
        rate = size / seconds
        share = rate / self.copy_rate if self.copy_rate else 1.0
        self.lines.append(
            f"  {name:34} {seconds * 1e6:8.0f} us {rate / 1e9:7.0f} GB/s {share:6.2f} of copy"
        )

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """One part of the table, whose failure leaves the others be."""
        self.lines.append(title)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.lines.append(f"  FAILED: {type(error).__name__}: {str(error)[:150]}")
        torch.cuda.empty_cache()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _whole(x: Tensor, dtype: torch.dtype) -> Fp8Matrix:
    scale = scale_of_whole(x, dtype)
    return Fp8Matrix(quantize(x, scale, dtype), scale)


def _by_row(x: Tensor, dtype: torch.dtype) -> Fp8Matrix:
    scale = scales_of_rows(x, dtype)
    return Fp8Matrix(quantize(x, scale, dtype), scale)


def _add(total: Tensor, product: Callable[[], Tensor]) -> None:
    add_rounded(total, product())


def products(bench: Bench, width: int, out: int) -> None:
    """Output, input gradient and weight gradient of one layer."""
    tokens, bf16 = bench.work.tokens, torch.bfloat16
    x, weight, dy = _random(tokens, width), _random(out, width), _random(tokens, out)
    flops = 2.0 * tokens * width * out
    bench.rate("output bf16", flops, lambda: x @ weight.t())
    bench.rate("input gradient bf16", flops, lambda: dy @ weight)
    for name, make in (("current", _whole), ("rowwise", _by_row)):
        a, b = make(x, E4M3), make(weight, E4M3)
        for fast in (True, False):
            how = f"output {name}{', fast' if fast else ''}"
            bench.rate(how, flops, partial(scaled_product, a, b, bf16, fast=fast))
        a, b = make(dy, E5M2), make(weight.t().contiguous(), E4M3)
        bench.rate(f"input gradient {name}", flops, partial(scaled_product, a, b, bf16))


def weight_gradients(bench: Bench, width: int, out: int) -> None:
    """Ways to add a weight gradient to fp32."""
    tokens, flops = bench.work.tokens, 2.0 * bench.work.tokens * width * out
    x, dy = _random(tokens, width), _random(tokens, out)
    main_grad = torch.zeros(out, width, device="cuda")

    def accumulate() -> None:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)

    bench.rate("weight gradient bf16, added inside", flops, accumulate)
    for name, make in (("current", _whole), ("rowwise", _by_row)):
        a, b = make(dy.t().contiguous(), E5M2), make(x.t().contiguous(), E4M3)
        for dtype in (torch.bfloat16, torch.float32):
            if name == "rowwise" and dtype == torch.float32:
                continue  # not offered by torch everywhere

            short = str(dtype).removeprefix("torch.")
            product = partial(scaled_product, a, b, dtype)
            bench.rate(f"weight gradient {name}, {short}", flops, product)
            added = partial(_add, main_grad, product)
            bench.rate(f"weight gradient {name}, {short}, added", flops, added)
    a, b = _whole(dy.t().contiguous(), E5M2), _whole(x.t().contiguous(), E4M3)
    inside = partial(add_scaled_product, main_grad, a, b, torch.bfloat16)
    bench.rate("weight gradient current, added inside", flops, inside)
    bench.rate(
        "weight gradient current, overwrites",
        flops,
        lambda: scaled_product(a, b, torch.float32, out=main_grad),
    )


def added_inside(bench: Bench) -> None:
    """Both ways to add a weight gradient of current scaling to fp32, side by side, and what a step
    of 8 layers and 4 microbatches, of which the first overwrites, would gain.
    """
    found = adder(torch.device("cuda"))
    if found is None:
        raise RuntimeError("cuBLASLt is not used; the warning above says why")
    bench.lines.append(f"  {'':6} {'then added':>20} {'added inside':>20} {'apart by':>10}")
    gain = 0.0
    for name, (width, out) in SHAPES.items():
        flops = 2.0 * bench.work.tokens * width * out
        a = _whole(_random(out, bench.work.tokens), E5M2)
        b = _whole(_random(width, bench.work.tokens), E4M3)
        totals = [torch.zeros(out, width, device="cuda") for _ in range(2)]
        bf16 = torch.bfloat16
        outside = partial(_add, totals[0], partial(scaled_product, a, b, bf16))
        inside = partial(add_scaled_product, totals[1], a, b, bf16)
        outside()
        inside()
        apart = ((totals[0] - totals[1]).norm() / totals[1].norm()).item()
        times = bench.seconds(outside), bench.seconds(inside)
        gain += 8 * 3 * (times[0] - times[1])
        cells = [f"{t * 1e3:7.3f} ms {flops / t / 1e12:4.0f} TF/s" for t in times]
        bench.lines.append(f"  {name:6} {cells[0]} {cells[1]} {apart:10.1e}")
    bench.lines.append(f"  a step gains {gain * 1e3:.1f} ms; cuBLASLt plans {len(found._plans)}")


def quantisers(bench: Bench, columns: int) -> None:
    """Kernels that read or write a matrix of tokens."""
    x = _random(bench.work.tokens, columns)
    size, scale = x.numel(), scale_of_whole(x, E4M3)
    rows, across = scales_of_rows(x, E4M3), scales_of_columns(x, E4M3)
    data = quantize(x, scale, E4M3)
    bench.traffic("largest of all", 2 * size, lambda: scale_of_whole(x, E4M3))
    bench.traffic("largest of rows", 2 * size, lambda: scales_of_rows(x, E4M3))
    bench.traffic("largest of columns", 2 * size, lambda: scales_of_columns(x, E4M3))
    bench.traffic("quantise", 3 * size, lambda: quantize(x, scale, E4M3))
    bench.traffic("quantise both ways", 4 * size, lambda: quantize_both(x, scale, scale, E4M3))
    bench.traffic("the same, rowwise", 4 * size, lambda: quantize_both(x, rows, across.t(), E4M3))
    bench.traffic("transpose of 8 bits", 2 * size, lambda: flip(Fp8Matrix(data, scale)))

    @torch.compile
    def plain(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        narrow = (x.float() * scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3)
        return narrow, narrow.t().contiguous()

    bench.traffic("quantise both ways, compiled", 4 * size, lambda: plain(x, scale))


def main() -> None:
    work = tyro.cli(Work, description=__doc__)
    if not torch.cuda.is_available():
        raise ConfigError("benchmarks/fp8_gemm.py measures a GPU, and there is none")
    torch.manual_seed(0)
    bench = Bench(work)
    with bench.section("copy of 1 GiB"):
        source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        bench.copy_rate = 2 * 2**30 / bench.seconds(lambda: target.copy_(source))
        bench.lines.append(f"  {bench.copy_rate / 1e9:.0f} GB/s")
    for name, (width, out) in SHAPES.items():
        with bench.section(f"{name}: {work.tokens} tokens, {width} to {out}"):
            products(bench, width, out)
        with bench.section(f"{name}, weight gradient"):
            weight_gradients(bench, width, out)
    for columns in (4096, 28672):
        with bench.section(f"quantisation of {work.tokens} x {columns}"):
            quantisers(bench, columns)
    with bench.section("weight gradients, current: rounded to bf16 and added, or added inside"):
        added_inside(bench)
    with bench.section("each kind of product, all shapes, in a step of 8 layers, 4 microbatches"):
        for name, seconds in bench.sums.items():
            bench.lines.append(f"  {name:38} {8 * 4 * seconds * 1e3:8.1f} ms")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("\n".join(bench.lines), flush=True)


if __name__ == "__main__":
    main()
