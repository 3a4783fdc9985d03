"""Every fused function on one GPU: its error against the plain function in fp32, and its bandwidth
beside that of a copy.

`python benchmarks/kernels.py` takes about a minute, most of it compilation; the shapes are those of
Llama-3-8B at 8192 tokens. `--device cpu --small` is a dry run of the plain functions. A row's bytes
are what the function must read and write, so that a share is one of what is possible.
"""

import functools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from core.data_parallel.main_grad import accumulate_rows
from core.kernels import cross_entropy, elementwise
from core.kernels.reduction import sum_of_squares
from core.layers.embedding import _Lookup
from core.optim.adamw import update_

TARGET = 0.85
"""Share of the copy rate that a kernel should reach."""
CACHE_BYTES = 200e6
"""Several second-level caches: inputs of a smaller case rotate over as much."""
TOLERANCE = 0.02
"""Largest error over the largest value: a few roundings to bf16."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""
    small: bool = False
    """Shapes for a dry run."""
    only: str = ""
    """Run the rows whose name contains this."""


@dataclass(frozen=True)
class Shapes:
    """t tokens, h width, f MLP width, n heads, g key and value heads, d head size, v vocabulary, p
    parameters.
    """

    t: int
    h: int
    f: int
    n: int
    g: int
    d: int
    v: int
    p: int
    device: torch.device


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    bytes: float
    """That one call must move."""
    prepare: Callable[[int], Callable[[], object]]
    """From a seed, a call on tensors of its own."""
    error: Callable[[], float]
    """Largest error against the plain function, over the largest value."""


def plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function under `core.kernels.compile.compiled`."""
    return fn.__wrapped__  # type: ignore[attr-defined, no-any-return]


def random(s: Shapes, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(s.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=s.device, dtype=torch.bfloat16)


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = []
    for a, b in zip(actual, expected, strict=True):
        errors.append(((a.float() - b.float()).abs().max() / b.float().abs().max()).item())
    return max(errors)


def differentiable(
    name: str,
    fn: Callable[..., Any],
    twin: Callable[..., Any],
    make: Callable[[int, int], list[Tensor]],
    s: Shapes,
    moved: tuple[float, float],
) -> Iterator[Case]:
    """Rows for the forward and the backward pass of `fn`; `make(seed, tokens)` gives its inputs."""

    def leaves(seed: int, tokens: int) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in make(seed, tokens)]

    def both(
        function: Callable[..., Any], inputs: list[Tensor]
    ) -> tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]:
        """Outputs, and a call of the backward pass, which may be repeated."""
        out = function(*inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        weights = [random(s, *y.shape, seed=9 + i).to(y.dtype) for i, y in enumerate(outs)]
        return outs, lambda: torch.autograd.grad(outs, inputs, weights, retain_graph=True)

    def forward(seed: int) -> Callable[[], object]:
        return functools.partial(fn, *leaves(seed, s.t))

    def backward(seed: int) -> Callable[[], object]:
        return both(fn, leaves(seed, s.t))[1]

    @functools.cache
    def results() -> list[list[Tensor]]:
        tokens = min(1000, s.t)
        inputs = leaves(0, tokens)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        outs, grads = both(fn, inputs)
        exact, exact_grads = both(twin, wide)
        return [outs, exact, list(grads()), list(exact_grads())]

    yield Case(f"{name} forward", moved[0], forward, lambda: largest_error(*results()[:2]))
    yield Case(f"{name} backward", moved[1], backward, lambda: largest_error(*results()[2:]))


def elementwise_cases(s: Shapes) -> Iterator[Case]:
    unit = 2.0 * s.t * s.h
    e = elementwise

    def hidden(seed: int, t: int) -> list[Tensor]:
        return [random(s, t, 1, s.h, seed=seed)]

    def with_weight(seed: int, t: int) -> list[Tensor]:
        return [*hidden(seed, t), random(s, s.h, seed=99)]

    def with_branch(seed: int, t: int) -> list[Tensor]:
        return [*with_weight(seed, t), *hidden(seed + 50, t)]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return e.rms_norm(x, weight, 1e-5)

    def twin(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = plain(e.rms_norm)(x, weight, 1e-5)
        return out

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return e.layer_norm(x, weight, weight, 1e-5)

    def layer_twin(x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = plain(e.layer_norm)(x, weight, weight, 1e-5)
        return out

    def sum_norm(x: Tensor, weight: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return e.add_rms_norm(x, branch, weight, 1e-5)

    def sum_twin(x: Tensor, weight: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return x + branch, twin(x + branch, weight)

    yield from differentiable("RMS norm", norm, twin, with_weight, s, (2 * unit, 3 * unit))
    yield from differentiable("layer norm", layer, layer_twin, with_weight, s, (2 * unit, 3 * unit))
    yield from differentiable(
        "residual sum + RMS norm", sum_norm, sum_twin, with_branch, s, (4 * unit, 4 * unit)
    )

    def gated(x: Tensor) -> Tensor:
        return e.gated_activation(x, None, "silu")

    def gated_twin(x: Tensor) -> Tensor:
        out: Tensor = plain(e.plain_gated_activation)(x, None, "silu")
        return out

    def inner(seed: int, t: int) -> list[Tensor]:
        return [random(s, t, 2 * s.f, seed=seed)]

    moved = 6.0 * s.t * s.f, 10.0 * s.t * s.f
    yield from differentiable("SwiGLU", gated, gated_twin, inner, s, moved)
    angles = torch.outer(torch.arange(s.t, device=s.device), torch.rand(s.d, device=s.device))
    cos, sin = angles.cos(), angles.sin()

    def heads(seed: int, t: int) -> list[Tensor]:
        """Queries and keys as they lie in the fused projection."""
        qkv = random(s, t, 1, s.n + 2 * s.g, s.d, seed=seed)
        return list(qkv.split([s.n, s.g, s.g], dim=2)[:2])

    def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return e.rotary(q, k, cos[: len(q)], sin[: len(q)])

    def rotary_twin(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = plain(e.rotary)(q, k, cos[: len(q)], sin[: len(q)])
        return out

    moved = (4.0 * s.t * (s.n + s.g) * s.d + 8.0 * s.t * s.d,) * 2
    yield from differentiable("rotary", rotary, rotary_twin, heads, s, moved)


def loss_cases(s: Shapes) -> Iterator[Case]:
    valid = s.v - 3

    def logits(seed: int, t: int) -> Tensor:
        return random(s, t, s.v, seed=seed)

    def labels(t: int) -> Tensor:
        return torch.arange(t, device=s.device) * 7 % valid

    def gradient_inputs(t: int) -> tuple[Any, ...]:
        """Beside logits of a standard normal distribution."""
        rows = torch.tensor([4.0, math.log(s.v) - 3.5], device=s.device).expand(t, 2).contiguous()
        return labels(t), rows, torch.ones(t, device=s.device), (0, valid), (0.0, 0.0)

    def read(seed: int) -> Callable[[], object]:
        return functools.partial(cross_entropy._row_statistics, logits(seed, s.t), valid, False)

    def read_error() -> float:
        x = logits(0, min(500, s.t))
        found = cross_entropy._row_statistics(x, valid, True)
        expected = plain(cross_entropy.plain_row_statistics)(x.float(), valid)
        return largest_error(found.unbind(1), expected.unbind(1))

    def write(seed: int) -> Callable[[], object]:
        return functools.partial(
            cross_entropy._write_gradient, logits(seed, s.t), *gradient_inputs(s.t)
        )

    def write_error() -> float:
        x = logits(0, min(500, s.t))
        exact = x.float()
        cross_entropy._write_gradient(x, *gradient_inputs(len(x)))
        plain(cross_entropy.plain_write_gradient)(exact, *gradient_inputs(len(x)))
        return largest_error([x], [exact])

    yield Case("cross entropy, statistics", 2.0 * s.t * s.v, read, read_error)
    yield Case("cross entropy, gradient", 4.0 * s.t * s.v, write, write_error)


def embedding_cases(s: Shapes) -> Iterator[Case]:
    def tokens(seed: int) -> Tensor:
        generator = torch.Generator(s.device).manual_seed(seed)
        return torch.randint(s.v, (s.t, 1), generator=generator, device=s.device)

    @functools.cache
    def table() -> Any:
        weight: Any = nn.Parameter(random(s, s.v, s.h))
        weight.main_grad = torch.zeros(s.v, s.h, device=s.device)
        weight.grad_ready = lambda: None
        return weight

    def look_up(seed: int) -> Callable[[], object]:
        return functools.partial(_Lookup.apply, tokens(seed), table(), 0)

    def add(seed: int) -> Callable[[], object]:
        rows = tokens(seed).flatten()
        return functools.partial(accumulate_rows, table(), rows, random(s, s.t, s.h, seed=seed))

    def look_up_error() -> float:
        return largest_error([look_up(0)()], [F.embedding(tokens(0), table())])  # type: ignore[list-item]

    def add_error() -> float:
        table().main_grad.zero_()
        add(0)()
        exact = torch.zeros(s.v, s.h, dtype=torch.float64, device=s.device)
        exact.index_add_(0, tokens(0).flatten(), random(s, s.t, s.h, seed=0).double())
        return largest_error([table().main_grad], [exact])

    yield Case("embedding forward", 4.0 * s.t * s.h, look_up, look_up_error)
    yield Case("embedding backward, into fp32", 10.0 * s.t * s.h, add, add_error)


def optimizer_cases(s: Shapes) -> Iterator[Case]:
    def gradients(seed: int) -> Callable[[], object]:
        flat = random(s, s.p, seed=seed).float()
        return functools.partial(sum_of_squares, flat.split(s.p // 4 // 128 * 128))

    def norm_error() -> float:
        expected = random(s, s.p, seed=0).double().square().sum()
        return largest_error([gradients(0)()], [expected])  # type: ignore[list-item]

    yield Case("gradient norm", 4.0 * s.p, gradients, norm_error)
    # Gradient, then what is read and written of master, moments and values.
    for name, per_element, remainder, narrow in (
        ("fp32 state", 4 + 2 * 12 + 2, False, False),
        ("remainders", 4 + 2 * (2 + 8) + 4, True, False),
        ("remainders, bf16 moments", 4 + 2 * (2 + 4) + 4, True, True),
    ):
        yield _update_case(s, name, float(per_element), remainder, narrow)


def _update_case(s: Shapes, name: str, per_element: float, remainder: bool, narrow: bool) -> Case:
    rows = s.p // 128

    def operands(seed: int, n: int) -> list[Any]:
        values = random(s, n, 128, seed=seed)
        moment = torch.bfloat16 if narrow else torch.float32
        master = torch.zeros_like(values, dtype=torch.int16) if remainder else values.float()
        first, second = random(s, n, 128, seed=seed + 1), random(s, n, 128, seed=seed + 2).square()
        scalars = [0.5, 1e-3, 1.2, 0.1, 0.95, 0.05, 1e-8, 0.999]
        return [
            random(s, n, 128, seed=seed + 3).float(),
            master,
            first.to(moment),
            second.to(moment),
            values,
            torch.tensor(scalars, device=s.device),
            torch.ones((), dtype=torch.bool, device=s.device),
            torch.tensor([12, 34, 0, 128], device=s.device) if narrow else None,
        ]

    def error() -> float:
        found, exact = operands(0, min(rows, 500)), operands(0, min(rows, 500))
        update_(*found)
        plain(update_)(*exact)
        return largest_error(found[2:5], exact[2:5])

    def prepare(seed: int) -> Callable[[], object]:
        return functools.partial(update_, *operands(seed, rows))

    return Case(f"AdamW, {name}", per_element * rows * 128, prepare, error)


def copy_case(s: Shapes) -> Case:
    numel = s.t * s.v

    def prepare(seed: int) -> Callable[[], object]:
        source = random(s, numel, seed=seed)
        return functools.partial(torch.empty_like(source).copy_, source)

    return Case("copy", 4.0 * numel, prepare, lambda: 0.0)


def seconds(case: Case, cuda: bool) -> float:
    """Median time of a call, over calls on buffers that together exceed the cache."""
    copies = math.ceil(CACHE_BYTES / case.bytes) if cuda else 1
    calls = [case.prepare(seed) for seed in range(min(copies, 16))]
    for call in calls:
        call()
    if not cuda:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    count = max(len(calls), 5)
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        # The host is ahead of the GPU from here on, so that no launch is waited for.
        torch.cuda._sleep(20_000_000)
        start_mark, end_mark = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_mark.record()
        for i in range(count):
            calls[i % len(calls)]()
        end_mark.record()
        torch.cuda.synchronize()
        times.append(start_mark.elapsed_time(end_mark) / 1e3 / count)
    return statistics.median(times)


def main() -> int:
    """Returns the number of rows that are wrong or broken."""
    options = tyro.cli(Options, description=__doc__)
    # A backward pass is repeated here, so what the forward pass has kept must stay.
    torch._functorch.config.donated_buffer = False
    device, cuda = torch.device(options.device), options.device == "cuda"
    s = Shapes(8192, 4096, 14336, 32, 8, 128, 128256, 1 << 28, device)
    if options.small:
        s = Shapes(24, 64, 48, 4, 2, 16, 1000, 1 << 16, device)
    copy = copy_case(s)
    rate = copy.bytes / seconds(copy, cuda)
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{where}, torch {torch.__version__}; copy {rate / 1e9:,.0f} GB/s (read and written)\n")
    print(f"{'function':32}{'MB':>8}{'us':>9}{'GB/s':>8}{'of copy':>9}{'error':>10}")
    wrong = slow = 0
    sections = (elementwise_cases, loss_cases, embedding_cases, optimizer_cases)
    for case in (case for section in sections for case in section(s)):
        if options.only not in case.name:
            continue
        try:
            error = case.error()
            taken = seconds(case, cuda)
        except Exception:
            wrong += 1
            print(f"{case.name:32}  FAILED")
            traceback.print_exc(file=sys.stdout)
            continue
        achieved = case.bytes / taken
        bad, behind = not error < TOLERANCE, cuda and achieved < TARGET * rate
        wrong, slow = wrong + bad, slow + behind
        print(
            f"{case.name:32}{case.bytes / 1e6:8.0f}{taken * 1e6:9.1f}{achieved / 1e9:8.0f}"
            f"{achieved / rate:9.2f}{error:10.1e}{'  WRONG' if bad else ''}"
            f"{'  slow' if behind else ''}",
            flush=True,
        )
        if cuda:
            torch.cuda.empty_cache()
    print(f"\n{wrong} wrong; {slow} below {TARGET} of the copy rate")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
