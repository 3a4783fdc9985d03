"""Speed of attention that does not cross documents, by several kernels, each checked against plain
attention in fp32: what the choice in `core/kernels/masked_attention.py` rests on.

`python benchmarks/varlen_attention.py`: one row of 8192 tokens, 32 query and 8 key heads of 128,
bf16, forward and backward. `--device cpu` runs what a CPU can, to test the script itself.
"""

import inspect
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.data.loader import same_length
from core.kernels.attention import attention
from core.kernels.attention_pattern import AttentionPattern
from core.kernels.masked_attention import Documents


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is measured."""

    seq_length: int = 8192
    """Tokens of the row."""
    heads: int = 32
    """Query heads."""
    groups: int = 8
    """Key and value heads."""
    size: int = 128
    """Of a head."""
    repeats: int = 10
    """Measurements, of which the median counts."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to run."""


@dataclass(frozen=True)
class Mix:
    """Documents of one row."""

    name: str
    lengths: tuple[int, ...]

    @property
    def bounds(self) -> Tensor:
        """int32 `[1, n + 1]`, filled up as the loader does."""
        exact = np.cumsum([0, *self.lengths]).astype(np.int32)
        return torch.from_numpy(np.stack(same_length([exact])))


def mixes(s: int) -> Iterator[Mix]:
    """From one long document to many short ones."""
    yield Mix("1 document", (s,))
    yield Mix("halves", (s // 2, s // 4, s // 8, s // 16, s // 16))
    yield Mix("8 equal", (s // 8,) * 8)
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < s:
        length = int(np.exp(rng.normal(np.log(s / 24), 1.0)))
        lengths.append(min(max(length, 1), s - sum(lengths)))
    yield Mix(f"{len(lengths)} uneven", tuple(lengths))
    yield Mix("128 equal", (s // 128,) * 128)


Kernel = Callable[[Tensor, Tensor, Tensor, Mix], Callable[[], Tensor]]
"""Takes q, k, v `[s, 1, n or g, d]`, prepares what a step prepares once, and returns a call."""


def by_core(q: Tensor, k: Tensor, v: Tensor, mix: Mix) -> Callable[[], Tensor]:
    """What training runs."""
    documents = Documents.between(mix.bounds.to(q.device), q.shape[0])
    pattern = AttentionPattern(True, q.shape[-1] ** -0.5)
    if q.is_cuda:
        documents.blocks(pattern)
    return lambda: attention(q, k, v, pattern, mask=documents)


def by_varlen(q: Tensor, k: Tensor, v: Tensor, mix: Mix) -> Callable[[], Tensor]:
    """`varlen_attn` of torch; its grid is that of as many documents of the longest's length."""
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = mix.bounds[0].to(q.device), max(mix.lengths)
    options: dict[str, Any] = {}  # the scale is 1 / sqrt(d) by default
    attend: Callable[..., Any] = varlen_attn  # whose signature grows from release to release
    parameters = inspect.signature(attend).parameters
    if "window_size" in parameters:
        options["window_size"] = (-1, 0)
    else:
        options["is_causal"] = True
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True

    def call() -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = attend(*flat, bounds, bounds, longest, longest, **options)
        return (out if isinstance(out, Tensor) else out[0])[:, None]

    return call


def by_varlen_expanded(q: Tensor, k: Tensor, v: Tensor, mix: Mix) -> Callable[[], Tensor]:
    """The same with a key head for every query head, where grouped ones are refused."""
    repeat = q.shape[2] // k.shape[2]

    def call() -> Tensor:
        return by_varlen(q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2), mix)()

    return call


def by_document(q: Tensor, k: Tensor, v: Tensor, mix: Mix) -> Callable[[], Tensor]:
    """By cuDNN, one document after another: needs their lengths on the host."""

    def call() -> Tensor:
        parts = (x.split(list(mix.lengths)) for x in (q, k, v))
        return torch.cat([_dense(*part) for part in zip(*parts, strict=True)])

    return call


def by_row(q: Tensor, k: Tensor, v: Tensor, mix: Mix) -> Callable[[], Tensor]:
    """By cuDNN over the whole row, blind to documents: what packing without a mask costs."""
    return lambda: _dense(q, k, v)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    qh, kh, vh = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


KERNELS: dict[str, Kernel] = {
    "core": by_core,
    "varlen_attn": by_varlen,
    "varlen_attn, expanded": by_varlen_expanded,
    "cuDNN by document": by_document,
    "cuDNN, no mask": by_row,
}


def plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, mix: Mix) -> list[Tensor]:
    """Output and gradients in fp32, a document and a group of heads at a time."""
    repeat = q.shape[2] // k.shape[2]
    leaves = [x.detach().float().requires_grad_() for x in (q, k, v)]
    out = torch.empty_like(leaves[0], requires_grad=False)
    first = 0
    for length in mix.lengths:
        at = slice(first, first + length)
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        for group in range(k.shape[2]):
            heads = slice(group * repeat, (group + 1) * repeat)
            qs, ks, vs = leaves[0][at, 0, heads], leaves[1][at, 0, group], leaves[2][at, 0, group]
            scores = torch.einsum("snd,zd->nsz", qs, ks) * q.shape[-1] ** -0.5
            part = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ vs
            part = part.transpose(0, 1)
            (part * weight[at, 0, heads].float()).sum().backward()
            out[at, 0, heads] = part.detach()
        first += length
    return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@dataclass(frozen=True)
class Result:
    """One kernel on one mix."""

    prepare: float
    """Milliseconds once a step."""
    forward: float
    backward: float
    error: float
    """Largest relative error of output and gradients, in norm."""


def _milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 3):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[3:])


def measure(work: Work, kernel: Kernel, mix: Mix, expected: Sequence[Tensor] | None) -> Result:
    """Check, then measure."""
    q, k, v, weight = inputs(work)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    call = kernel(q, k, v, mix)
    out = call()
    found = [out.detach(), *torch.autograd.grad(out, leaves, weight)]
    error = float("nan")
    if expected is not None:
        pairs = zip(found, expected, strict=True)
        error = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
    prepare = _milliseconds(lambda: kernel(q, k, v, mix), work.device, work.repeats)
    forward = _milliseconds(call, work.device, work.repeats)

    def both() -> None:
        torch.autograd.grad(call(), leaves, weight)

    backward = _milliseconds(both, work.device, work.repeats) - forward
    return Result(prepare, forward, backward, error)


def inputs(work: Work) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and what the output is multiplied by, `[s, 1, n or g, d]`."""
    generator = torch.Generator(work.device).manual_seed(0)
    kind = torch.bfloat16 if work.device == "cuda" else torch.float32
    q, k, v, weight = (
        torch.randn(
            work.seq_length, 1, heads, work.size, generator=generator, device=work.device
        ).to(kind)
        for heads in (work.heads, work.groups, work.groups, work.heads)
    )
    return q, k, v, weight


def main(work: Work) -> None:
    """Measure every kernel on every mix and print a table."""
    name = torch.cuda.get_device_name() if work.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {work}")
    rows = []
    for mix in mixes(work.seq_length):
        expected = plain(*inputs(work), mix)
        # 4 FLOPs a visible pair of tokens, head and channel; 2.5 times that in the backward pass.
        pairs = sum(length * (length + 1) / 2 for length in mix.lengths)
        flops = 4.0 * pairs * work.heads * work.size
        for kernel_name, kernel in KERNELS.items():
            blind = kernel is by_row and len(mix.lengths) > 1
            if kernel is by_document and len(mix.lengths) > 16:
                continue  # a launch for each document, and a plan for each length
            try:
                result = measure(work, kernel, mix, None if blind else expected)
            except Exception:  # one kernel that fails must not hide the others
                traceback.print_exc()
                rows.append(f"{mix.name:12} {kernel_name:24} failed, see above")
                continue
            forward, backward = (
                flops * factor / (ms * 1e9)
                for factor, ms in ((1.0, result.forward), (2.5, result.backward))
            )
            verdict = "not checked" if blind else ("ok" if result.error < 1.5e-2 else "WRONG")
            rows.append(
                f"{mix.name:12} {kernel_name:24} {result.prepare:8.3f} {result.forward:8.3f} "
                f"{result.backward:8.3f} {forward:8.0f} {backward:8.0f} {result.error:8.1e} "
                f"{verdict}"
            )
            print(rows[-1], flush=True)
    columns = ("once ms", "fwd ms", "bwd ms", "fwd TF/s", "bwd TF/s", "error")
    print("\ndocuments    kernel                   ", *(f"{name:>8}" for name in columns))
    print("\n".join(rows))


if __name__ == "__main__":
    main(tyro.cli(Work, description=__doc__))
