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
from core.layers.embedding import table_rows
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
    variants: bool = True
    """Time other launches of some hand-written kernels too. On a CPU that needs Triton's
    interpreter (TRITON_INTERPRET=1)."""


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
    return fn.__wrapped__  # type: ignore[attr-defined]


def with_rest(fn: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    """The function of tensors alone: `rest` comes after them."""
    return lambda *tensors: fn(*tensors, *rest)


def underneath(fn: Callable[..., Any], *rest: Any) -> Callable[..., Any]:
    """`with_rest` of the function that would be compiled."""
    return with_rest(plain(fn), *rest)


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
        tokens = min(1024, s.t)
        inputs = leaves(0, tokens)
        wide = [x.detach().float().requires_grad_() for x in inputs]
        outs, grads = both(fn, inputs)
        exact, exact_grads = both(twin, wide)
        return [outs, exact, list(grads()), list(exact_grads())]

    yield Case(f"{name} forward", moved[0], forward, lambda: largest_error(*results()[:2]))
    yield Case(f"{name} backward", moved[1], backward, lambda: largest_error(*results()[2:]))


def norm_cases(s: Shapes) -> Iterator[Case]:
    def vector(seed: int) -> Tensor:
        return random(s, s.h, seed=seed)

    def hidden(seed: int, t: int) -> Tensor:
        return random(s, t, 1, s.h, seed=seed)

    def query_heads(seed: int, t: int) -> list[Tensor]:
        qkv = random(s, t, 1, s.n + 2 * s.g, s.d, seed=seed)
        return [qkv[:, :, : s.n], random(s, s.d, seed=99)]

    def both(seed: int, t: int) -> list[Tensor]:
        return [hidden(seed, t), hidden(seed + 50, t)]

    def added(x: Tensor, branch: Tensor, weight: Tensor) -> Any:
        return elementwise.add_norm(x, branch, None, weight, None, 1e-5)

    def added_twin(x: Tensor, branch: Tensor, weight: Tensor) -> Any:
        return x + branch, rms(x + branch, weight)

    def all_added_twin(x: Tensor, branch: Tensor, extra: Tensor, *affine: Tensor) -> Any:
        total = x + branch + extra
        return total, layer(total, *affine)

    rms = underneath(elementwise.plain_rms_norm, 1e-5)
    layer = underneath(elementwise.plain_layer_norm, 1e-5)
    unit, heads = 2.0 * s.t * s.h, 2.0 * s.t * s.n * s.d
    yield from differentiable(
        "RMS norm",
        with_rest(elementwise.rms_norm, 1e-5),
        rms,
        lambda seed, t: [hidden(seed, t), vector(99)],
        s,
        (2 * unit, 3 * unit),
    )
    for name, fn in (("", elementwise.rms_norm), (", compiled", elementwise.plain_rms_norm)):
        yield from differentiable(
            f"RMS norm of heads{name}",
            with_rest(fn, 1e-5),
            rms,
            query_heads,
            s,
            (2 * heads, 3 * heads),
        )
    yield from differentiable(
        "layer norm",
        with_rest(elementwise.layer_norm, 1e-5),
        layer,
        lambda seed, t: [hidden(seed, t), vector(98), vector(99)],
        s,
        (2 * unit, 3 * unit),
    )
    yield from differentiable(
        "sum + RMS norm",
        added,
        added_twin,
        lambda seed, t: [*both(seed, t), vector(99)],
        s,
        (4 * unit, 4 * unit),
    )
    yield from differentiable(
        "sum + bias + layer norm",
        with_rest(elementwise.add_norm, 1e-5),
        all_added_twin,
        lambda seed, t: [*both(seed, t), vector(97), vector(98), vector(99)],
        s,
        (4 * unit, 4 * unit),
    )


def elementwise_cases(s: Shapes) -> Iterator[Case]:
    yield from differentiable(
        "SwiGLU",
        with_rest(elementwise.mlp_activation, None, "silu", True),
        underneath(elementwise.plain_mlp_activation, None, "silu", True),
        lambda seed, t: [random(s, t, 2 * s.f, seed=seed)],
        s,
        (6.0 * s.t * s.f, 10.0 * s.t * s.f),
    )
    yield from differentiable(
        "bias + GELU",
        with_rest(elementwise.mlp_activation, "gelu_tanh", False),
        underneath(elementwise.plain_mlp_activation, "gelu_tanh", False),
        lambda seed, t: [random(s, t, s.f, seed=seed), random(s, s.f, seed=99)],
        s,
        (4.0 * s.t * s.f, 6.0 * s.t * s.f),
    )
    yield from differentiable("rotary", *rotary_functions(s))


def tables(s: Shapes) -> tuple[Tensor, Tensor]:
    """Tables of cos and sin as a model holds them."""
    angles = torch.outer(torch.arange(s.t, device=s.device), torch.rand(s.d // 2, device=s.device))
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos(), angles.sin()


def queries_and_keys(s: Shapes, seed: int, t: int) -> list[Tensor]:
    """As they lie in the fused projection."""
    qkv = random(s, t, 1, s.n + 2 * s.g, s.d, seed=seed)
    return list(qkv.split([s.n, s.g, s.g], dim=2)[:2])


def rotary_bytes(s: Shapes) -> float:
    return 4.0 * s.t * (s.n + s.g) * s.d + 8.0 * s.t * s.d


def rotary_functions(s: Shapes) -> tuple[Any, ...]:
    """Arguments of `differentiable` after the name."""
    cos, sin = tables(s)

    def rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return elementwise.rotary(q, k, cos[: len(q)], sin[: len(q)])

    def twin(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = plain(elementwise.plain_rotary)(
            q, k, cos[: len(q)], sin[: len(q)]
        )
        return out

    make = functools.partial(queries_and_keys, s)
    return rotary, twin, make, s, (rotary_bytes(s),) * 2


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
        return functools.partial(table_rows, tokens(seed), table())

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


NORM_LAUNCHES = ((132, 8192, 32, 3), (132, 4096, 16, 4), (132, 4096, 16, 5), (264, 4096, 16, 3))
"""Programs, elements at a time and for each thread, tokens under way."""
ACTIVATION_LAUNCHES = ((16, 1024, 4, 3), (128, 1024, 4, 3), (32, 1024, 4, 3), (16, 512, 2, 3))
"""Tokens and columns of a program, warps, tokens under way."""
ROTARY_LAUNCHES = ((32, 4), (32, 8), (16, 4), (16, 2))
"""Heads at a time, warps."""


def variant_cases(s: Shapes) -> Iterator[tuple[str, Case]]:
    """Ways to launch some kernels, the defaults among them: what for, and how."""
    from core.kernels import triton_elementwise, triton_norm

    def norm(launch: triton_norm.Launch, centred: bool, passing: bool, seed: int) -> Any:
        x, dnormed, dtotal = (random(s, s.t, 1, s.h, seed=seed + i) for i in (0, 50, 100))
        weight = random(s, s.h, seed=99)
        bias = weight if centred else None
        statistics = triton_norm.forward(x, None, None, weight, bias, 1e-5)[2]
        given = x, weight, statistics, dnormed, dtotal if passing else None, centred and passing
        return functools.partial(triton_norm.backward, *given, launch)

    def gelu(launch: triton_elementwise.ActivationLaunch, back: bool, seed: int) -> Any:
        x, dy, bias = random(s, s.t, s.f, seed=seed), random(s, s.t, s.f), random(s, s.f)
        if back:
            call = triton_elementwise.activation_backward
            return lambda: call(x, bias, dy, "gelu_tanh", False, launch)
        return lambda: triton_elementwise.activation_forward(x, bias, "gelu_tanh", False, launch)

    def turn(launch: triton_elementwise.RotaryLaunch, back: bool, seed: int) -> Any:
        q, k = queries_and_keys(s, seed, s.t)
        if back:
            q, k = q.contiguous(), k.contiguous()
        return functools.partial(triton_elementwise.turn, q, k, *tables(s), back, launch)

    for title, centred, passing in (
        ("RMS norm", False, False),
        ("layer norm", True, False),
        ("sum + RMS norm", False, True),
        ("sum + bias + layer norm", True, True),
    ):
        for cut in NORM_LAUNCHES:
            name = "{} programs, {} elements, {} a thread, {} stages".format(*cut)
            prepare = functools.partial(norm, triton_norm.Launch(*cut), centred, passing)
            moved = (8.0 if passing else 6.0) * s.t * s.h
            yield f"{title} backward", Case(name, moved, prepare, lambda: 0.0)
    for direction, back in (("forward", False), ("backward", True)):
        for cut in ACTIVATION_LAUNCHES:
            name = "{} tokens, {} columns, {} warps, {} stages".format(*cut)
            prepare = functools.partial(gelu, triton_elementwise.ActivationLaunch(*cut), back)
            moved = (6.0 if back else 4.0) * s.t * s.f
            yield f"bias + GELU {direction}", Case(name, moved, prepare, lambda: 0.0)
        for heads, warps in ROTARY_LAUNCHES:
            launch = triton_elementwise.RotaryLaunch(heads, warps)
            prepare = functools.partial(turn, launch, back)
            name = f"{heads} heads, {warps} warps"
            yield f"rotary {direction}", Case(name, rotary_bytes(s), prepare, lambda: 0.0)


def compare_variants(s: Shapes, rate: float, cuda: bool) -> int:
    """Time the variants and print them last, as a short table; returns how many broke."""
    lines: dict[str, list[tuple[float, str]]] = {}
    broken = 0
    for title, case in variant_cases(s):
        try:
            share = case.bytes / seconds(case, cuda) / rate
            lines.setdefault(title, []).append((share, case.name))
        except Exception:
            broken += 1
            print(f"{title}, {case.name}: FAILED")
            traceback.print_exc(file=sys.stdout)
    print("\nvariants, of the copy rate")
    for title, found in lines.items():
        for share, name in found:
            print(f"{title:34}{name:44}{share:6.3f}{'  best' if share == max(found)[0] else ''}")
    return broken


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


def guarded(section: Callable[[Shapes], Iterator[Case]], s: Shapes) -> Iterator[Case | None]:
    """The cases of a section, and None where it breaks, after which it has no more."""
    try:
        yield from section(s)
    except Exception:
        print(f"{section.__name__}  FAILED")
        traceback.print_exc(file=sys.stdout)
        yield None


def measure(case: Case, rate: float, cuda: bool) -> tuple[bool, bool]:
    """Print a row; whether it is wrong or broken, and whether it is slow."""
    try:
        # First, as a compiled function is tuned by its first call, and that of a run is this size.
        taken = seconds(case, cuda)
        error = case.error()
    except Exception:
        print(f"{case.name:34}  FAILED")
        traceback.print_exc(file=sys.stdout)
        return True, False
    achieved = case.bytes / taken
    bad, behind = not error < TOLERANCE, cuda and achieved < TARGET * rate
    print(
        f"{case.name:34}{case.bytes / 1e6:8.0f}{taken * 1e6:9.1f}{achieved / 1e9:8.0f}"
        f"{achieved / rate:9.2f}{error:10.1e}{'  WRONG' if bad else ''}"
        f"{'  slow' if behind else ''}",
        flush=True,
    )
    return bad, behind


def main() -> int:
    """Returns 1 if a row is wrong or broken."""
    options = tyro.cli(Options, description=__doc__)
    # A backward pass is repeated here, so what the forward pass has kept must stay.
    torch._functorch.config.donated_buffer = False
    device, cuda = torch.device(options.device), options.device == "cuda"
    s = Shapes(8192, 4096, 14336, 32, 8, 128, 128256, 1 << 28, device)
    if options.small:
        s = Shapes(24, 64, 48, 4, 2, 16, 1000, 1 << 16, device)
    start = time.perf_counter()
    copy = copy_case(s)
    rate = copy.bytes / seconds(copy, cuda)
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{where}, torch {torch.__version__}; copy {rate / 1e9:,.0f} GB/s (read and written)\n")
    print(f"{'function':34}{'MB':>8}{'us':>9}{'GB/s':>8}{'of copy':>9}{'error':>10}")
    wrong = slow = 0
    for section in (norm_cases, elementwise_cases, loss_cases, embedding_cases, optimizer_cases):
        for case in guarded(section, s):
            if case is None:
                wrong += 1
            elif options.only in case.name:
                bad, behind = measure(case, rate, cuda)
                wrong, slow = wrong + bad, slow + behind
                if cuda:
                    torch.cuda.empty_cache()
    if options.variants:
        wrong += compare_variants(s, rate, cuda)
    took = time.perf_counter() - start
    print(f"\n{wrong} wrong or broken; {slow} below {TARGET} of the copy rate; {took:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
