"""Where a step's time goes, by the names of its kernels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.contestants.registry import Contestant

CLASSES: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl|all_?gather|all_?reduce|reduce_?scatter"),
    ("attention", r"fmha|flash|sdpa|attention|cudnn_generated|cudnn.*(fprop|bprop).*(sm80|sm90)"),
    ("GEMM", r"gemm|nvjet|xmma|cutlass|cublas|splitk|_mm_kernel"),
    ("loss", r"cross_?entropy|log_?softmax|nll|softmax|online_softmax|_exp_|amax.*exp"),
    ("optimizer", r"adam|multi_?tensor|lpnorm|l2norm|foreach|vector_norm|fused_optim|update"),
    ("FP8 casts", r"fp8|quantiz|cast_transpose|_cast_|amax|delayed_scal|float8|e4m3|e5m2"),
    ("norm", r"rms_?norm|layer_?norm|rsqrt|ln_(fwd|bwd)|norm"),
    ("activation", r"swiglu|silu|gelu|sigmoid|dsilu|gated|_act"),
    ("rotary", r"rope|rotary"),
    ("copies", r"memcpy|memset|copy|fill"),
)
"""Class and pattern of the kernels' names in small letters: the first that is found counts. The
rest is `other`, whose largest kernels are listed."""


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel."""

    name: str
    start: float
    """Microseconds."""
    end: float


def kernel_class(name: str) -> str:
    """The class of a kernel's name."""
    lower = name.lower()
    return next((label for label, pattern in CLASSES if re.search(pattern, lower)), "other")


def attribute(kernels: Sequence[Kernel]) -> tuple[dict[str, float], float]:
    """Milliseconds by class, idle among them, and of the whole step.

    What runs beside something that started earlier counts only from its end on, so that the classes
    add up to the step.
    """
    spent: dict[str, float] = {}
    ordered = sorted(kernels, key=lambda kernel: (kernel.start, kernel.end))
    first = reached = ordered[0].start if ordered else 0.0
    for kernel in ordered:
        if kernel.start > reached:
            spent["idle"] = spent.get("idle", 0.0) + (kernel.start - reached) / 1e3
            reached = kernel.start
        if kernel.end > reached:
            label = kernel_class(kernel.name)
            spent[label] = spent.get(label, 0.0) + (kernel.end - reached) / 1e3
            reached = kernel.end
    return spent, (reached - first) / 1e3


def record(contestant: Contestant) -> list[Kernel]:
    """The kernels of one step on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        contestant.step()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]


def describe(name: str, kernels: Sequence[Kernel], largest: int = 40) -> str:
    """The attribution as text, and the kernels with most time."""
    spent, whole = attribute(kernels)
    if not kernels:
        return f"{name}: no kernel was recorded"
    lines = [f"{name}: one step of {whole:.1f} ms, {len(kernels)} kernels"]
    for label, ms in sorted(spent.items(), key=lambda item: -item[1]):
        lines.append(f"  {label:14} {ms:8.2f} ms {ms / whole:6.1%}")
    runs: dict[str, list[float]] = {}
    for kernel in kernels:
        runs.setdefault(kernel.name, []).append((kernel.end - kernel.start) / 1e3)
    lines.append("  the largest kernels:")
    for kernel_name, took in sorted(runs.items(), key=lambda item: -sum(item[1]))[:largest]:
        label = kernel_class(kernel_name)
        lines.append(f"  {sum(took):8.2f} ms {len(took):5} x  {label:13} {kernel_name[:100]}")
    return "\n".join(lines)
