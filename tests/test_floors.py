"""The floors: a package imports only from floors below its own, and start-up stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"drafts": 1, "serving": 2, "bench": 3, "afaspec": 4}
FILES = [path for package in FLOORS for path in sorted((ROOT / package).rglob("*.py"))]
HEAVY = {"torch", "transformers", "vllm", "matplotlib", "datasets", "peft", "accelerate"}
MAX_LINES = 400


def imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Modules that the code imports when run; those for type checkers only are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, inside_functions=inside_functions)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_imports_go_down_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(parse(path), inside_functions=True):
        top = module.partition(".")[0]
        allowed = top == package or FLOORS.get(top, 0) < FLOORS[package]
        assert allowed, f"{package} (floor {FLOORS[package]}) imports {module}"


@pytest.mark.parametrize(
    ("package", "forbidden"), [("drafts", "vllm"), ("serving", "peft"), ("bench", "peft")]
)
def test_what_a_package_never_needs(package: str, forbidden: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for module in imports(parse(path), inside_functions=True):
            assert module.partition(".")[0] != forbidden, f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


CLI_FILES = [path for path in FILES if "cli" in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("path", CLI_FILES, ids=names(CLI_FILES))
def test_commands_import_nothing_heavy_at_start(path: Path) -> None:
    seen: set[Path] = set()
    pending = [path]
    while pending:
        current = pending.pop()
        seen.add(current)
        for module in imports(parse(current), inside_functions=False):
            assert module.partition(".")[0] not in HEAVY, f"{current} imports {module} at start"
            for found in _files_of(module):
                if found not in seen:
                    pending.append(found)


def _files_of(module: str) -> list[Path]:
    """The repository's files that importing `module` runs."""
    parts = module.split(".")
    if parts[0] not in FLOORS:
        return []
    packages = [ROOT.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    return [path for path in [*packages, ROOT.joinpath(*parts).with_suffix(".py")] if path.exists()]
