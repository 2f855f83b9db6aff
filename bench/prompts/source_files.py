"""A folder of source files as prompts: which files count, and what was passed over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.prompts.rows import CHARS_PER_TOKEN, Prompt, passages, split_key
from drafts.errors import UserError

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
NEAR_COPIES = 4  # files that begin alike, such as generated ones, would crowd out the rest


def source_prompts(
    root: Path,
    prompt_tokens: int,
    seed: int,
    suffixes: tuple[str, ...] | None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Prompt]:
    """Passages of the files below `root`; `note` is told what was passed over.

    Raises `UserError` where no file is of use.
    """
    skipped: Counter[str] = Counter()
    alike: Counter[str] = Counter()
    count = 0
    shortest = CHARS_PER_TOKEN * prompt_tokens if root.is_dir() else 1
    for path, text in source_texts(root, suffixes or SUFFIXES, shortest, skipped):
        alike[key := split_key(text)] += 1
        if alike[key] > NEAR_COPIES:
            skipped["near-copies"] += 1
            continue
        count += 1
        yield from passages(text, str(path), prompt_tokens=prompt_tokens, seed=seed)
    passed = ", ".join(f"{n} {why}" for why, n in sorted(skipped.items()))
    if note and passed:
        note(f"{root}: {count} files read, passed over: {passed}")
    if count == 0:
        ends = " ".join(suffixes) if suffixes else "the usual source suffixes"
        raise UserError(
            f"holds no usable text file; expected names ending in {ends}"
            + (f" (passed over: {passed})" if passed else ""),
            where=root,
            hint="lower --prompt-tokens if they are too short; `afaspec capture` takes other "
            "endings with --suffixes",
        )


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
