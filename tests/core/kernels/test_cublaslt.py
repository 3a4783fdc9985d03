"""The calls of cuBLASLt against a library of the same interface that multiplies on a CPU; the real
one is met in tests/gpu."""

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.kernels import cublaslt
from core.kernels.cublaslt import WORKSPACE, Adder, CublasLt, CublasLtError, loaded_library
from core.kernels.fp8 import E4M3, E5M2, Fp8Matrix, dequantize, quantize, scale_of_whole

CPU = torch.device("cpu")
FORMATS = {0: torch.float32, 28: E4M3, 29: E5M2}
OPERATION = {3: ctypes.c_int32, 4: ctypes.c_int32, 17: ctypes.c_void_p, 18: ctypes.c_void_p} | {
    25: ctypes.c_int8
}
SEARCH = {1: ctypes.c_size_t, **dict.fromkeys((5, 6, 7, 8), ctypes.c_uint32)}
STREAM = 7


class _Library:
    """The documented meaning of the functions: matrices column by column, on host memory. A value
    of another size than the attribute's is refused, as the real library does."""

    def __init__(self, **statuses: int) -> None:
        self.made: dict[int, Any] = {}
        self.calls: list[str] = []
        self.last: tuple[Any, ...] = ()
        self.algorithms, self.workspace = 1, 1024
        self.error = 0.0

        def declare(name: str) -> None:
            def function(*args: Any) -> int:
                self.calls.append(name)
                assert len(args) == len(function.argtypes)  # type: ignore[attr-defined]
                if name in statuses:
                    return statuses[name]
                status: int = getattr(self, f"_{name.removeprefix('cublasLt')}")(*args)
                return status

            setattr(self, name, function)

        for name in cublaslt._SIGNATURES:
            declare(name)

    def _new(self, where: Any, thing: Any) -> int:
        self.made[1000 + len(self.made)] = thing
        where._obj.value = 999 + len(self.made)
        return 0

    def _Create(self, where: Any) -> int:
        return self._new(where, "handle")

    def _MatmulDescCreate(self, where: Any, compute: int, scale: int) -> int:
        assert (compute, scale) == (68, 0)
        return self._new(where, {3: 0, 4: 0, 17: None, 18: None, 25: 0})

    def _MatrixLayoutCreate(self, where: Any, kind: int, rows: int, columns: int, ld: int) -> int:
        return self._new(where, (FORMATS[kind], rows, columns, ld))

    def _MatmulPreferenceCreate(self, where: Any) -> int:
        return self._new(where, {})

    def _MatmulPreferenceDestroy(self, search: Any) -> int:
        self.made[search.value]["gone"] = True
        return 0

    def _set(self, kinds: dict[int, Any], owner: Any, attribute: int, value: Any, size: int) -> int:
        if size != ctypes.sizeof(kinds[attribute]):
            return 7
        self.made[owner.value][attribute] = kinds[attribute].from_buffer_copy(value._obj).value
        return 0

    def _MatmulDescSetAttribute(self, *args: Any) -> int:
        return self._set(OPERATION, *args)

    def _MatmulPreferenceSetAttribute(self, *args: Any) -> int:
        return self._set(SEARCH, *args)

    def _MatmulAlgoGetHeuristic(self, *args: Any) -> int:
        *_, search, wanted, found, count = args
        self.last = tuple(self.made[args[6].value].items())
        assert "gone" not in self.made[search.value]
        assert wanted == 1
        found._obj.algorithm[0], found._obj.workspace = 77, self.workspace
        count._obj.value = self.algorithms
        return 0

    def _Matmul(self, handle: Any, operation: Any, alpha: Any, *rest: Any) -> int:
        a, la, b, lb, beta, c, lc, d, ld, algorithm, workspace, size, stream = rest
        assert (self.made[handle.value], algorithm._obj[0], stream) == ("handle", 77, STREAM)
        assert workspace > 0
        assert size == WORKSPACE
        described = self.made[operation.value]
        # Hopper's FP8 products: the first factor transposed, the second not.
        assert [described[i] for i in (3, 4, 25)] == [1, 0, 0]
        scales = [ctypes.c_float.from_address(described[i]).value for i in (17, 18)]
        product = self._read(a, la).t().double() @ self._read(b, lb).double()
        total = alpha._obj.value * scales[0] * scales[1] * product
        total += beta._obj.value * self._read(c, lc).double() + self.error
        kind, rows, columns, leading = self.made[ld.value]
        assert (kind, tuple(total.shape), leading) == (torch.float32, (rows, columns), rows)
        data = total.t().float().contiguous()
        ctypes.memmove(d, data.data_ptr(), data.numel() * 4)
        return 0

    def _read(self, where: int, layout: Any) -> Tensor:
        kind, rows, columns, leading = self.made[layout.value]
        assert leading == rows
        data = bytearray(ctypes.string_at(where, rows * columns * kind.itemsize))
        return torch.frombuffer(data, dtype=kind).view(columns, rows).t()


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    cublaslt._adder.cache_clear()
    yield
    cublaslt._adder.cache_clear()


def _adder(library: _Library) -> Adder:
    return Adder(CublasLt(library), CPU)


def _matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Fp8Matrix:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
    scale = scale_of_whole(x, dtype)
    return Fp8Matrix(quantize(x, scale, dtype), scale)


def _exact(total: Tensor, a: Fp8Matrix, b: Fp8Matrix) -> Tensor:
    wide = torch.float64
    return total.double() + dequantize(a, wide) @ dequantize(b, wide).t()


@pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E5M2), (E4M3, E4M3)])
@pytest.mark.parametrize("shape", [(16, 48, 32), (64, 16, 80)])
def test_adds_the_product_to_a_view_of_a_bucket(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    o, i, t = shape
    library = _Library()
    adder = _adder(library)
    flat = torch.randn(o * i + 128, generator=torch.Generator().manual_seed(5))
    total, before = flat[64:-64].view(o, i), flat.clone()
    for seed in range(3):  # each with scales of its own
        a, b = _matrix(o, t, dtypes[0], seed), _matrix(i, t, dtypes[1], seed + 1)
        expected = _exact(total, a, b)
        assert adder.add(total, a, b)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(flat[:64], before[:64])
    assert torch.equal(flat[-64:], before[-64:])
    # One search for a shape and alignment; memory of a CPU is not aligned alike every time.
    searches = library.calls.count("cublasLtMatmulAlgoGetHeuristic")
    assert searches == len(adder._plans)
    adder.add(total, a, b)
    assert library.calls.count("cublasLtMatmulAlgoGetHeuristic") == searches
    assert library.calls.count("cublasLtMatmul") == 4
    assert list(adder._workspaces) == [STREAM]


def test_the_search_knows_workspace_and_alignment() -> None:
    library = _Library()
    flat = torch.zeros(16 * 32 + 64)
    offset = 4 + (-flat.data_ptr() // 4) % 64  # 16 bytes past a multiple of 256
    a, b = _matrix(16, 32, E5M2), _matrix(32, 32, E4M3)
    assert _adder(library).add(flat[offset:][: 16 * 32].view(16, 32), a, b)
    found = dict(library.last)
    assert found[1] == WORKSPACE
    assert (found[7], found[8]) == (16, 16)
    assert min(found[5], found[6]) >= 32


@pytest.mark.parametrize("name", [n for n in cublaslt._SIGNATURES if n != "cublasLtCreate"])
def test_every_status_is_checked(name: str) -> None:
    adder = _adder(_Library(**{name: 13}))
    with pytest.raises(CublasLtError, match=rf"^{name} of cuBLASLt failed with status 13$"):
        adder.add(torch.zeros(16, 32), _matrix(16, 32, E5M2), _matrix(32, 32, E4M3))


def _refused(adder: Adder, total: Tensor, terms: int, caplog: pytest.LogCaptureFixture) -> str:
    before = total.clone()
    a, b = _matrix(total.shape[0], terms, E5M2), _matrix(total.shape[1], terms, E4M3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not adder.add(total, a, b)
    assert torch.equal(total, before)
    (record,) = caplog.records  # once, not at every call
    return record.getMessage()


@pytest.mark.parametrize("how", ["status", "none", "workspace"])
def test_without_an_algorithm_says_so_once(how: str, caplog: pytest.LogCaptureFixture) -> None:
    library = _Library(**({"cublasLtMatmulAlgoGetHeuristic": 15} if how == "status" else {}))
    library.algorithms = int(how != "none")
    library.workspace = WORKSPACE + (how == "workspace")
    said = _refused(_adder(library), torch.ones(16, 32), 48, caplog)
    assert said == (
        "an FP8 product [16, 48] x [48, 32] is added after it is made: cuBLASLt has no algorithm"
    )
    assert "cublasLtMatmul" not in library.calls


def test_misaligned_sums_are_left_to_others(caplog: pytest.LogCaptureFixture) -> None:
    library = _Library()
    flat = torch.zeros(16 * 32 + 64)
    offset = 1 + (-flat.data_ptr() // 4) % 64
    said = _refused(_adder(library), flat[offset:][: 16 * 32].view(16, 32), 32, caplog)
    assert said.endswith("a matrix is aligned to 4 bytes, not to 16")
    assert library.calls == ["cublasLtCreate"]


@pytest.mark.parametrize(
    "shape", [(0, 32, 16), (16, 0, 16), (16, 32, 0), (8, 32, 16), (16, 24, 16), (16, 32, 40)]
)
def test_empty_and_odd_products_are_left_to_others(shape: tuple[int, int, int]) -> None:
    o, i, t = shape
    one = torch.ones(1, 1)
    a = Fp8Matrix(torch.zeros(o, t).to(E5M2), one)
    b = Fp8Matrix(torch.zeros(i, t).to(E4M3), one)
    library = _Library()
    assert not _adder(library).add(torch.zeros(o, i), a, b)
    assert library.calls == ["cublasLtCreate"]


def test_a_library_that_agrees_with_torch_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, **_: Any) -> Tensor:
        return (a.double() @ b.double() * scale_a * scale_b).float()

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    _adder(_Library()).prove()
    wrong = _Library()
    wrong.error = 5.0
    with pytest.raises(CublasLtError, match=r"adds another product than torch's \(error"):
        _adder(wrong).prove()
    wrong.error = float("nan")
    with pytest.raises(CublasLtError, match="adds another product"):
        _adder(wrong).prove()
    none = _Library()
    none.algorithms = 0
    with pytest.raises(CublasLtError, match="no algorithm that adds"):
        _adder(none).prove()


def test_where_it_cannot_be_used_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Any:
        raise CublasLtError("torch has loaded no libcublasLt")

    monkeypatch.setattr(cublaslt, "loaded_library", missing)
    for _ in range(2):
        assert cublaslt.adder(torch.device("cuda", 0)) is None
    (record,) = caplog.records
    assert record.getMessage() == (
        "FP8 weight gradients are added after they are made: torch has loaded no libcublasLt"
    )


def test_other_sums_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    adder = _adder(_Library())
    monkeypatch.setattr(cublaslt, "adder", lambda device: adder)
    a, b, total = _matrix(16, 32, E5M2), _matrix(48, 32, E4M3), torch.zeros(16, 48)
    assert cublaslt.add_product(total, a, b)
    assert total.any()
    assert not cublaslt.add_product(total.double(), a, b)
    assert not cublaslt.add_product(torch.zeros(48, 16).t(), a, b)
    by_row = Fp8Matrix(a.data, torch.ones(16, 1))
    assert not cublaslt.add_product(total, by_row, b)
    monkeypatch.setattr(cublaslt, "adder", lambda device: None)
    assert not cublaslt.add_product(total, a, b)


def test_takes_the_library_of_the_process(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    with pytest.raises(CublasLtError, match="torch has loaded no libcublasLt"):
        loaded_library(maps)
    maps.write_text("7f00-7f10 r-xp 00000000 08:01 42   /usr/lib/libcublas.so.13\n")
    with pytest.raises(CublasLtError, match="torch has loaded no libcublasLt"):
        loaded_library(maps)
    lines = Path("/proc/self/maps").read_text().splitlines()
    libc = next(line[line.index("/") :] for line in lines if "/libc.so" in line)
    mine = tmp_path / "libcublasLt.so.13"
    mine.symlink_to(libc)
    maps.write_text(f"7f00-7f10 r-xp 00000000 08:01 42   {mine}\n")
    library = loaded_library(maps)
    assert library._name == str(mine)
    with pytest.raises(CublasLtError, match="has no cublasLtCreate"):
        CublasLt(library)
