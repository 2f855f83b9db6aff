"""Files stay small and start-up stays light; who may import whom is import-linter's to hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("drafts", "serving", "bench", "afaspec")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
HEAVY = {"torch", "transformers", "vllm", "matplotlib", "datasets", "peft", "accelerate"}
MAX_LINES = 400


def imports(node: ast.AST) -> Iterator[str]:
    """Modules imported at start: not inside functions, and not for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


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
        for module in imports(parse(current)):
            assert module.partition(".")[0] not in HEAVY, f"{current} imports {module} at start"
            for found in _files_of(module):
                if found not in seen:
                    pending.append(found)


def _files_of(module: str) -> list[Path]:
    """The repository's files that importing `module` runs."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return []
    packages = [ROOT.joinpath(*parts[:i], "__init__.py") for i in range(1, len(parts) + 1)]
    return [path for path in [*packages, ROOT.joinpath(*parts).with_suffix(".py")] if path.exists()]
