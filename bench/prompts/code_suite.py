"""A suite of source code without a file of its own: what a Python environment with PyTorch holds.

Which text that is depends on the versions installed; the suite's hash tells.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from bench.prompts.rows import Prompt
from bench.prompts.source_files import source_prompts

STDLIB, PACKAGES, HEADERS = "python_stdlib", "python_packages", "cpp_headers"
CATEGORIES = (STDLIB, PACKAGES, HEADERS)
# Some by different authors that every environment with afaspec has; all would take long to read.
STDLIB_READ = (
    "asyncio", "concurrent", "ctypes", "email", "http", "importlib", "json", "logging",
    "multiprocessing", "unittest", "urllib", "xml",
)  # fmt: skip
PACKAGES_READ = ("accelerate", "datasets", "peft", "pydantic", "rich", "typer")
HEADERS_READ = ("c10", "torch/csrc")


@lru_cache(maxsize=2)  # both sizes are made of the same passages
def code_prompts(prompt_tokens: int) -> tuple[Prompt, ...]:
    """Passages of the standard library, of installed packages and of PyTorch's C++ headers."""
    return tuple(
        replace(
            prompt,
            id=f"code:{Path(prompt.id).relative_to(root.parent).as_posix()}",
            category=category,
        )
        for category, root, suffixes in _roots()
        for prompt in source_prompts(root, prompt_tokens, 0, suffixes)
    )


def _roots() -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """(category, folder, suffixes) of what is there; nothing is imported to find it."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in STDLIB_READ:
        if (stdlib / name).is_dir():
            yield STDLIB, stdlib / name, (".py",)
    for package in PACKAGES_READ:
        if (folder := _folder(package)) is not None:
            yield PACKAGES, folder, (".py",)
    torch = _folder("torch")
    for name in HEADERS_READ:
        if torch is not None and (torch / "include" / name).is_dir():
            yield HEADERS, torch / "include" / name, (".h", ".hpp", ".cuh")


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None
