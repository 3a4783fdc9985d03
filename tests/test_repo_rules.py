"""Rules of the repository that a reader may rely on."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("core", "models", "converters")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, MAX_FOLDER = 600, 80, 8, 600
MAX_READING = 4900
"""Lines of one training step's reading list."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _allowed(path: Path, module: str) -> bool:
    """Who may import whom: see CONTRIBUTING.md."""
    inside = path.relative_to(ROOT).parts
    target = module.split(".")
    if target[0] not in PACKAGES:
        return True
    if inside[0] == "core":
        return target[0] == "core"
    if inside[0] == "converters":
        return target[0] != "models" or module.startswith("models.registry")
    if len(inside) == 2:  # models/*.py, which span families
        return target[0] != "models" or not (ROOT / "models" / target[1]).is_dir()
    if target[0] == "converters":
        return inside[2] == "convert.py"
    if target[0] == "models":
        return target[1:2] in ([inside[1]], ["registry"]) or (
            inside[1] == "multimodal" and target[1:2] == ["llama"]
        )
    return True


@pytest.mark.parametrize("path", _sources(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    wrong = [module for module in _imports(path) if not _allowed(path, module)]
    assert not wrong, f"{path.relative_to(ROOT)} may not import {wrong}"


def test_what_spans_families_names_none() -> None:
    """A new family needs no change there."""
    families = [path.parent.name for path in (ROOT / "models").glob("*/__init__.py")]
    assert families
    word = re.compile(rf"(?i)\b({'|'.join(families)})\b")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in _sources("core/training", "core/pipeline", "converters")
        for line in path.read_text().splitlines()
        if word.search(line)
    ]
    assert not found


def test_triton_is_imported_where_it_runs() -> None:
    """Only inside functions, and at the head of `core/kernels/triton_*.py`: a CPU needs none."""
    early = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in _sources(*PACKAGES)
        for line in path.read_text().splitlines()
        if line.startswith(("import triton", "from triton", "from core.kernels.triton_"))
        and not path.name.startswith("triton_")
    ]
    assert not early


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in _sources(*PACKAGES, "tests", "benchmarks", "examples")
        if (lines := len(path.read_text().splitlines())) > MAX_FILE
    }
    assert not long, f"over {MAX_FILE} lines: {long}"


def _functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield node


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": lines
        for path in _sources(*PACKAGES, "benchmarks", "examples")
        for node in _functions(path)
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    }
    assert not long, f"over {MAX_FUNCTION} lines: {long}"


def _counts(argument: ast.arg) -> bool:
    """Whether it is data: the constants of a Triton kernel rather name a variant of it."""
    constant = argument.annotation and ast.unparse(argument.annotation) == "tl.constexpr"
    return argument.arg not in ("self", "cls") and not constant


def test_signatures_are_short() -> None:
    long = {}
    for path in _sources(*PACKAGES):
        for node in _functions(path):
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(map(_counts, every))
            if count > MAX_PARAMETERS:
                long[f"{path.relative_to(ROOT)}:{node.name}"] = count
    assert not long, f"over {MAX_PARAMETERS} parameters: {long}"


def test_no_global_statement() -> None:
    users = [
        str(path.relative_to(ROOT))
        for path in _sources(*PACKAGES)
        if any(isinstance(node, ast.Global) for node in ast.walk(ast.parse(path.read_text())))
    ]
    assert not users


def test_model_folders_are_small() -> None:
    for folder in (ROOT / "models").iterdir():
        if not (folder / "__init__.py").exists():
            continue
        code = 0
        for path in folder.glob("*.py"):
            if path.name == "config.py":
                continue  # presets are data
            lines = path.read_text().splitlines()
            code += sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)
        assert code <= MAX_FOLDER, f"{folder.name} has {code} lines of code beside its presets"


def test_tests_mirror_the_tree() -> None:
    """tests/core/x/test_y.py tests core/x/y.py, or a module or folder of that name."""
    strays = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        inside = path.relative_to(ROOT / "tests")
        if inside.parts[0] not in PACKAGES:
            continue
        folder = ROOT / inside.parent
        if not folder.is_dir():
            strays.append(str(inside))
    assert not strays, f"no folder of the code matches {strays}"


def test_one_training_step_is_short() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    section = page.partition("## One training step, in reading order")[2].partition("On the way")[0]
    table = re.findall(r"(\d+) \| `([\w/]+\.py)`", section)
    assert len(table) > 20
    lines = sum(len((ROOT / name).read_text().splitlines()) for _, name in table)
    assert lines <= MAX_READING
    assert lines == pytest.approx(sum(int(stated) for stated, _ in table), rel=0.03)


def test_named_files_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:core|models|converters|tests|benchmarks)/[\w/]+\.py)", page)
    assert len(named) > 100
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing
