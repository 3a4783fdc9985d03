"""Every Triton kernel compiled for an H100 or H200, which needs no GPU: the interpreter accepts
what the compiler does not. In a process of its own, as the interpreter is chosen at import."""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")


def _norm_sizes(heads: int, width: int) -> dict[str, int]:
    block = 1 << (heads - 1).bit_length(), 1 << (width - 1).bit_length()
    sizes = {"STRIDE": heads * width, "HEADS": heads, "WIDTH": width, "EARLY": True}
    return {**sizes, "HEAD_BLOCK": block[0], "BLOCK": block[1]}


def _norm_backward_sizes(heads: int, width: int) -> dict[str, int]:
    sizes = _norm_sizes(heads, width)
    block = sizes.pop("HEAD_BLOCK") * sizes["BLOCK"]
    tokens = 8192 // block
    return {**sizes, "TOKENS": tokens, "ROW_BLOCK": 8192 // sizes["BLOCK"]}


def _rotary_sizes(heads: int, groups: int, size: int, half: int) -> dict[str, int]:
    sizes = {"HEADS": heads, "GROUPS": groups, "SIZE": size, "HALF": half, "HALF_BLOCK": half}
    blocks = [1 << (n - 1).bit_length() for n in (heads, groups, max(size - 2 * half, 1))]
    return {**sizes, **dict(zip(("HEAD_BLOCK", "GROUP_BLOCK", "REST_BLOCK"), blocks, strict=True))}


CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    *(
        (
            "triton_elementwise",
            "_activate",
            f"T {bias} T *i32 i32 i32".replace("T", f"*{dtype}"),
            {"GATED": gated, "KIND": kind, "TOKENS": tokens, "BLOCK": 1024, "STAGES": stages},
        )
        for dtype in ("bf16", "fp32")
        for kind in ("silu", "gelu", "gelu_tanh", "relu")
        for gated, bias, tokens, stages in ((True, "None", 1, 1), (False, "T", 128, 3))
    ),
    *(
        (
            "triton_elementwise",
            "_activate_back",
            f"T {bias} T T {sums} *i32 i32 i32".replace("T", f"*{dtype}"),
            {"GATED": gated, "KIND": kind, "TOKENS": tokens, "BLOCK": 1024, "STAGES": stages},
        )
        for dtype in ("bf16", "fp32")
        for kind in ("silu", "gelu", "gelu_tanh", "relu")
        for gated, bias, sums, tokens, stages in (
            (True, "None", "None", 1, 1),
            (True, "T", "*fp32", 128, 3),
            (False, "T", "*fp32", 128, 3),
        )
    ),
    *(
        ("triton_cross_entropy", "_row_statistics", "*bf16 *fp32 i32 i32", constants)
        for constants in (
            {"TOTAL": True, "BLOCK": 2048, "WIDE": 8},
            {"TOTAL": False, "BLOCK": 2048, "WIDE": 8},
        )
    ),
    *(
        (
            "triton_elementwise",
            "_turn",
            "*bf16 *bf16 *fp32 *fp32 *bf16 *bf16 i32 i32",
            {"BACK": back, "BATCH": 2, **sizes},
        )
        for back in (True, False)
        for sizes in (_rotary_sizes(32, 8, 128, 64), _rotary_sizes(12, 12, 64, 8))
    ),
    *(
        ("triton_norm", "_forward", types, {"EPS": 1e-5, **sizes})
        for types in (
            "*bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *bf16 *fp32",
            "*bf16 *bf16 None *bf16 None *bf16 *bf16 *fp32",
            "*fp32 None None *fp32 *fp32 *fp32 *fp32 *fp32",
        )
        for sizes in (_norm_sizes(1, 4096), _norm_sizes(12, 64))
    ),
    *(
        (
            "triton_norm",
            "_backward",
            f"*bf16 *bf16 *fp32 *bf16 {dtotal} *bf16 *fp32 i32",
            {"CENTRED": centred, "EXTRA": centred, "STAGES": stages, **sizes},
        )
        for dtotal, centred, stages in (("*bf16", True, 3), ("*bf16", False, 1), ("None", False, 2))
        for sizes in (_norm_backward_sizes(1, 4096), _norm_backward_sizes(12, 64))
    ),
    (
        "triton_reduction",
        "_sum_rows",
        "*fp32 *bf16 i32 i32",
        {"COLUMNS": 32, "ROWS": 256, "EARLY": True},
    ),
    (
        "triton_cross_entropy",
        "_write_gradient",
        "*bf16 *i64 *fp32 i32 i32 fp32 fp32",
        {"BLOCK": 2048},
    ),
    *(
        (
            "triton_reduction",
            "_sum_of_squares",
            f"*fp32 *fp64 {size}",
            {"BLOCK": 1024, "ROUNDS": 16},
        )
        for size in ("i32", "i64")
    ),
    *(
        (
            "triton_fp8",
            "_quantize_both",
            f"*bf16 *fp32 *fp32 *{dtype} *{dtype} i32 i32",
            {"BY_ROW": by_row},
        )
        for dtype in ("fp8e4nv", "fp8e5")
        for by_row in (False, True)
    ),
    ("triton_embedding", "_look_up", "*i64 *bf16 *bf16 i32", {"WIDTH": 4096, "BLOCK": 4096}),
    ("triton_embedding", "_add_rows", "*fp32 *i64 *bf16 i32", {"WIDTH": 4096, "BLOCK": 4096}),
    ("triton_fp8", "_transpose", "*u8 *u8 i32 i32", {}),
]
"""Module, kernel, types of its arguments (None: the argument is absent), and its constants."""


def _compile(module: str, name: str, types: str, constants: dict[str, Any]) -> str:
    """The kernel in PTX, with pointers and numbers that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"core.kernels.{module}"), name)
    names = kernel.arg_names
    plain = [name for name in names if name not in constants]
    given = dict(zip(plain, types.split(), strict=True))
    constants = {**constants, **{name: None for name, kind in given.items() if kind == "None"}}
    plain = [name for name in names if name not in constants]
    signature = {**dict.fromkeys(names, "constexpr"), **{name: given[name] for name in plain}}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in plain
            if not signature[name].startswith("fp")
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def test_kernels_compile_with_wide_loads() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=300)


if __name__ == "__main__":
    for case in CASES:
        assert "ld.global.v4" in _compile(*case), case
