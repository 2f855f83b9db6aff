"""Programming tasks out of Python's standard library: a domain that every machine has."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from drafts.files import atomic_file

SHORTEST, LONGEST = 40, 300  # characters of what a function is said to do
OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "lib2to3"}


def write_tasks(path: Path) -> None:
    """A prompt for each function of the library that is public and says in words what it does."""
    rows = ({"messages": [{"role": "user", "content": text}]} for text in python_tasks())
    with atomic_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def python_tasks() -> list[str]:
    """The tasks, by the order of the files; of functions that are called alike, the first."""
    library = Path(sysconfig.get_path("stdlib"))
    tasks: dict[str, str] = {}
    for file in sorted(library.rglob("*.py")):
        if OTHERS.isdisjoint(file.relative_to(library).parts):
            for name, text in _documented(file):
                tasks.setdefault(name, text)
    return [*tasks.values()]


def _documented(file: Path) -> Iterator[tuple[str, str]]:
    """Name of each documented function in a file, and the task to write it."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # some of the library's files are broken by intent
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        if SHORTEST <= len(text) <= LONGEST:
            named = [one.arg for one in node.args.args if one.arg not in ("self", "cls")]
            yield node.name, f"Write a Python function `{node.name}({', '.join(named)})`. {text}"
