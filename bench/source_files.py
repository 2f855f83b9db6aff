"""A folder of source files as plain texts: which files count, and what was passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# fmt: off
SUFFIXES = (
    ".c", ".cc", ".cpp", ".cs", ".cu", ".cuh", ".cxx", ".go", ".h", ".hh", ".hpp", ".hxx", ".inl",
    ".java", ".jl", ".js", ".kt", ".lua", ".md", ".ml", ".php", ".pl", ".proto", ".py", ".pyi",
    ".pyx", ".r", ".rb", ".rs", ".rst", ".scala", ".sh", ".sql", ".swift", ".tex", ".ts", ".tsx",
    ".txt", ".zig",
)
# fmt: on
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "build", "dist"}
HUGE_BYTES = 1 << 20  # generated tables and bundles, rarely anyone's traffic


def source_texts(
    root: Path, suffixes: tuple[str, ...], shortest: int, skipped: Counter[str]
) -> Iterator[tuple[Path, str]]:
    """Yield (path, text) in a fixed order; what is passed over is counted in `skipped`.

    `shortest` is the least number of characters worth a prompt.
    """
    for path in source_paths(root, suffixes):
        size = path.stat().st_size
        if size > HUGE_BYTES:
            skipped["huge"] += 1
            continue
        data = path.read_bytes()
        if not data.strip():
            skipped["empty"] += 1
        elif (text := _text(data)) is None:
            skipped["binary"] += 1
        elif len(text) < shortest:
            skipped["too short"] += 1
        else:
            yield path, text


def source_paths(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files below `root` with one of `suffixes`, sorted; hidden and build folders left out."""
    if root.is_file():
        return [root]
    wanted = {suffix.lower() for suffix in suffixes}
    found = []
    for path in root.rglob("*"):
        parents = path.relative_to(root).parts[:-1]
        if any(part.startswith(".") or part in SKIPPED_FOLDERS for part in parents):
            continue
        if path.suffix.lower() in wanted and path.is_file():
            found.append(path)
    return sorted(found)


def _text(data: bytes) -> str | None:
    """The text, or None for a binary file."""
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
