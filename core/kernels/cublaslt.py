"""Products of FP8 matrices that are added to an fp32 matrix inside the kernel, by cuBLASLt. torch
has no such product, so the library that torch has loaded is called without it.

Used on CUDA only. The numbers and signatures are those of the headers `cublasLt.h`, `cublas_api.h`
and `library_types.h`, the same in CUDA 12 and 13.

Legend: o and i rows of the two factors, t what a product sums over.
"""

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.kernels.fp8 import E4M3, E5M2, Fp8Matrix

logger = logging.getLogger(__name__)

_COMPUTE_32F, _TRANSPOSED, _AS_IT_IS = 68, 1, 0
_FP32, _FP8 = 0, {E4M3: 28, E5M2: 29}
_TRANSPOSE_A, _TRANSPOSE_B, _SCALE_A, _SCALE_B, _FAST_SUMS = 3, 4, 17, 18, 25
"""Attributes of an operation."""
_MAX_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)
"""Attributes of a search; alignments of A, B, C and D."""
_SUCCESS, _NOT_SUPPORTED = 0, 15

WORKSPACE = 32 << 20
"""Bytes for each stream: what NVIDIA advises for Hopper."""
_ALIGNED, _ALIGNED_BEST = 16, 256
"""Bytes: what FP8 products need of every matrix, and beyond which nothing is gained."""


class CublasLtError(RuntimeError):
    """The library is missing, refuses a call, or does not compute what torch does."""


class _Found(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


_P, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_P,),
    "cublasLtMatmulDescCreate": (_P, _INT, _INT),
    "cublasLtMatmulDescSetAttribute": (_P, _INT, _P, _SIZE),
    "cublasLtMatrixLayoutCreate": (_P, _INT, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64),
    "cublasLtMatmulPreferenceCreate": (_P,),
    "cublasLtMatmulPreferenceSetAttribute": (_P, _INT, _P, _SIZE),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, _INT, _P, _P),
    "cublasLtMatmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _SIZE, _P),
}


class CublasLt:
    """The functions of the library that are used here; each returns a status."""

    def __init__(self, library: Any) -> None:
        """Declare the functions of a loaded library.

        Raises:
            CublasLtError: it lacks one.
        """
        self._functions: dict[str, Any] = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise CublasLtError(f"the cuBLASLt library that torch has loaded has no {name}")
            function.argtypes, function.restype = signature, ctypes.c_int
            self._functions[name] = function

    def status(self, name: str, *args: Any) -> int:
        """What a function returns."""
        status: int = self._functions[name](*args)
        return status

    def call(self, name: str, *args: Any) -> None:
        """Call a function.

        Raises:
            CublasLtError: it does not succeed.
        """
        status = self.status(name, *args)
        if status != _SUCCESS:
            raise CublasLtError(f"{name} of cuBLASLt failed with status {status}")

    def make(self, name: str, *args: Any) -> ctypes.c_void_p:
        """What a function makes whose first argument is where to put it."""
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *args)
        return made

    def put(self, name: str, owner: ctypes.c_void_p, attribute: int, value: Any) -> None:
        """Set an attribute; the type of the value is part of the interface."""
        self.call(name, owner, attribute, ctypes.byref(value), ctypes.sizeof(value))


def loaded_library(maps: Path = Path("/proc/self/maps")) -> Any:
    """The cuBLASLt that this process has loaded; no other one is looked for.

    Args:
        maps: the process's memory map, a line for each piece, ending with the file it is from.

    Raises:
        CublasLtError: there is none.
    """
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = sorted({line[line.index("/") :] for line in lines if "/libcublasLt.so" in line})
    if not paths:
        raise CublasLtError("torch has loaded no libcublasLt")
    return ctypes.CDLL(paths[-1])


@dataclass(frozen=True)
class _Plan:
    """How products of one shape run. All handles live as long as the process."""

    operation: ctypes.c_void_p
    a: ctypes.c_void_p
    b: ctypes.c_void_p
    total: ctypes.c_void_p
    algorithm: Any


@dataclass(frozen=True)
class _Case:
    """What a plan depends on."""

    rows: int
    """o."""
    columns: int
    """i."""
    terms: int
    """t."""
    a: torch.dtype
    b: torch.dtype
    aligned: tuple[int, int, int]
    """Bytes to which a, b and the sum are aligned."""


class Adder:
    """Adds products on one device.

    The scales of a product are put into its plan when it is launched, so two threads must not add
    at once. Backward passes and products put off do not: one waits for the other.
    """

    def __init__(self, library: CublasLt, device: torch.device) -> None:
        self._library, self._device = library, device
        with torch.cuda.device(device):
            self._handle = library.make("cublasLtCreate")
        self._plans: dict[_Case, _Plan | None] = {}
        self._workspaces: dict[int, Tensor] = {}
        self._one = ctypes.c_float(1.0)

    def add(self, total: Tensor, a: Fp8Matrix, b: Fp8Matrix) -> bool:
        """Add `a b^T` if cuBLASLt can. Where it cannot, for good for such matrices, the reason is
        logged as a warning the first time.

        Args:
            total: fp32 `[o, i]`, contiguous.
            a: `[o, t]`, scaled as a whole.
            b: `[i, t]`, likewise.

        Returns:
            Whether it has been added.

        Raises:
            CublasLtError: a call failed.
        """
        (rows, terms), columns = a.data.shape, b.data.shape[0]
        aligned = (_alignment(a.data), _alignment(b.data), _alignment(total))
        case = _Case(rows, columns, terms, a.data.dtype, b.data.dtype, aligned)
        with torch.cuda.device(self._device):
            if case not in self._plans:
                self._plans[case] = self._plan(case, a.scale, b.scale)
            plan = self._plans[case]
            if plan is None:
                return False
            library, one = self._library, ctypes.byref(self._one)
            # Column by column, which is how cuBLAS reads, memory holds the transposes: the sum is
            # `b a^T` `[i, o]`, b `[t, i]`, to be transposed, and a `[t, o]`, as it is. So cuBLAS's
            # first factor is b. Only FP8 products of this kind exist on Hopper.
            self._set_scales(plan.operation, a.scale, b.scale)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            library.call(
                "cublasLtMatmul",
                *(self._handle, plan.operation, one),
                *(b.data.data_ptr(), plan.b, a.data.data_ptr(), plan.a, one),
                *(total.data_ptr(), plan.total, total.data_ptr(), plan.total),
                *(ctypes.byref(plan.algorithm), self._workspace(stream).data_ptr(), WORKSPACE),
                stream,
            )
        return True

    def prove(self) -> None:
        """Add one small product and compare with torch's; the host waits for the device.

        Raises:
            CublasLtError: a call failed, there is no algorithm, or the numbers differ.
        """
        o, i, t, border = 64, 96, 160, 64
        scale = torch.full((1, 1), 0.75, dtype=torch.float32, device=self._device)
        a = Fp8Matrix(self._numbers(o, t, 61).to(E5M2), scale)
        b = Fp8Matrix(self._numbers(i, t, 53).to(E4M3), scale * 3)
        flat = self._numbers(1, o * i + 2 * border, 47).view(-1)
        before, total = flat.clone(), flat[border:-border].view(o, i)
        product = torch._scaled_mm(
            a.data, b.data.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=torch.float32
        )
        expected = before[border:-border].view(o, i) + product
        if not self.add(total, a, b):
            raise CublasLtError("cuBLASLt has no algorithm that adds an FP8 product to fp32")
        error = ((total - expected).norm() / product.norm()).item()
        if not error < 1e-2:  # both add up with few bits, in an order of their own
            raise CublasLtError(f"cuBLASLt adds another product than torch's (error {error:.1e})")
        total.zero_()
        before[border:-border] = 0
        if not torch.equal(flat, before):
            raise CublasLtError("cuBLASLt has written outside of the matrix that it adds to")

    def _numbers(self, rows: int, columns: int, period: int) -> Tensor:
        """Between -2 and 2, without a draw from a random generator."""
        steps = torch.arange(rows * columns, device=self._device) * 29 % period - period // 2
        return (steps.float() * (4.0 / period)).view(rows, columns)

    def _plan(self, case: _Case, a_scale: Tensor, b_scale: Tensor) -> _Plan | None:
        problem = _problem(case)
        plan = self._search(case, a_scale, b_scale) if problem is None else None
        if plan is None:
            shape = f"[{case.rows}, {case.terms}] x [{case.terms}, {case.columns}]"
            why = problem or "cuBLASLt has no algorithm"
            logger.warning("an FP8 product %s is added after it is made: %s", shape, why)
        return plan

    def _set_scales(self, operation: ctypes.c_void_p, a_scale: Tensor, b_scale: Tensor) -> None:
        for attribute, scale in ((_SCALE_A, b_scale), (_SCALE_B, a_scale)):
            where = ctypes.c_void_p(scale.data_ptr())
            self._library.put("cublasLtMatmulDescSetAttribute", operation, attribute, where)

    def _search(self, case: _Case, a_scale: Tensor, b_scale: Tensor) -> _Plan | None:
        library, set_operation = self._library, "cublasLtMatmulDescSetAttribute"
        operation = library.make("cublasLtMatmulDescCreate", _COMPUTE_32F, _FP32)
        for attribute, value in (
            (_TRANSPOSE_A, ctypes.c_int32(_TRANSPOSED)),
            (_TRANSPOSE_B, ctypes.c_int32(_AS_IT_IS)),
            # Gradients are added up in fp32, as in `scaled_product`.
            (_FAST_SUMS, ctypes.c_int8(0)),
        ):
            library.put(set_operation, operation, attribute, value)
        self._set_scales(operation, a_scale, b_scale)
        make = "cublasLtMatrixLayoutCreate"
        t = case.terms
        a = library.make(make, _FP8[case.a], t, case.rows, t)
        b = library.make(make, _FP8[case.b], t, case.columns, t)
        total = library.make(make, _FP32, case.columns, case.rows, case.columns)
        search = library.make("cublasLtMatmulPreferenceCreate")
        set_search = "cublasLtMatmulPreferenceSetAttribute"
        library.put(set_search, search, _MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE))
        of_a, of_b, of_total = case.aligned
        for attribute, aligned in zip(_ALIGNMENTS, (of_b, of_a, of_total, of_total), strict=True):
            library.put(set_search, search, attribute, ctypes.c_uint32(aligned))
        found, count = _Found(), ctypes.c_int(0)
        arguments = (self._handle, operation, b, a, total, total, search, 1)
        name = "cublasLtMatmulAlgoGetHeuristic"
        status = library.status(name, *arguments, ctypes.byref(found), ctypes.byref(count))
        library.call("cublasLtMatmulPreferenceDestroy", search)
        if status not in (_SUCCESS, _NOT_SUPPORTED):
            raise CublasLtError(f"{name} of cuBLASLt failed with status {status}")
        if status or not count.value or found.status or found.workspace > WORKSPACE:
            return None
        return _Plan(operation, a, b, total, found.algorithm)

    def _workspace(self, stream: int) -> Tensor:
        if stream not in self._workspaces:
            made = torch.empty(WORKSPACE, dtype=torch.uint8, device=self._device)
            self._workspaces[stream] = made
        return self._workspaces[stream]


def _alignment(x: Tensor) -> int:
    """Bytes, a power of two."""
    pointer = x.data_ptr()
    return min(pointer & -pointer, _ALIGNED_BEST)


def _problem(case: _Case) -> str | None:
    """Why cuBLASLt need not be asked."""
    if min(case.rows, case.columns, case.terms) == 0:
        return "it is empty"
    if any(size % _ALIGNED for size in (case.rows, case.columns, case.terms)):
        return f"not all of its sizes are multiples of {_ALIGNED}"
    if min(case.aligned) < _ALIGNED:
        return f"a matrix is aligned to {min(case.aligned)} bytes, not to {_ALIGNED}"
    return None


def add_product(total: Tensor, a: Fp8Matrix, b: Fp8Matrix) -> bool:
    """`Adder.add` on the device of the matrices, or False where it has none, where scales are not
    of the whole matrix, or where the sum is not contiguous fp32.
    """
    if total.dtype != torch.float32 or not total.is_contiguous():
        return False
    if a.scale.numel() != 1 or b.scale.numel() != 1:
        return False
    found = adder(total.device)
    return found is not None and found.add(total, a, b)


def adder(device: torch.device) -> Adder | None:
    """What adds products on a CUDA device; None, with a warning in the log, where cuBLASLt is
    missing or does not compute what torch does. Decided once in the process.
    """
    return _adder(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _adder(index: int) -> Adder | None:
    try:
        made = Adder(CublasLt(loaded_library()), torch.device("cuda", index))
        made.prove()
    except CublasLtError as error:
        logger.warning("FP8 weight gradients are added after they are made: %s", error)
        return None
    return made
