"""Real text that is already on the machine: the training corpus and the demo's domains.

Python source comes from the standard library and installed packages, C++ from the headers that
PyTorch ships. Texts of a development checkout (`extra`) are used when a folder is given.
Files are sampled with a seeded generator, so the same machine gives the same corpus.
"""

from __future__ import annotations

import gzip
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

MIN_CHARS, MAX_CHARS = 400, 60_000
CPP_SUFFIXES = (".h", ".hpp", ".cuh", ".cpp", ".cc")


@dataclass
class Corpus:
    """Documents by domain, and how often each domain is drawn in training."""

    documents: dict[str, list[str]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def characters(self) -> dict[str, int]:
        return {name: sum(map(len, docs)) for name, docs in self.documents.items()}


def read_text(path: Path) -> str | None:
    """A file's text if it is clean UTF-8 of a useful length, else None."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    if not MIN_CHARS <= len(text) <= MAX_CHARS or "\x00" in text:
        return None
    if max(map(len, text.splitlines()), default=0) > 1000:  # minified or generated data
        return None
    return text


def python_files() -> Iterator[Path]:
    """Source of the standard library, then of the installed packages."""
    paths = sysconfig.get_paths()
    stdlib, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    skip = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    for root, outside in ((stdlib, skip), (packages, {"tests", "test", "__pycache__"})):
        for path in sorted(root.rglob("*.py")):
            if not outside & set(path.relative_to(root).parts):
                yield path


def cpp_files() -> Iterator[Path]:
    """The C++ headers that come with PyTorch."""
    root = Path(torch.__file__).parent / "include"
    # The one-function operator headers are thousands of near-copies of each other.
    for path in sorted(root.rglob("*")):
        if path.suffix in CPP_SUFFIXES and "ops" not in path.relative_to(root).parts:
            yield path


def sample_texts(paths: Iterable[Path], characters: int, seed: int) -> list[str]:
    """Texts of randomly chosen files, until `characters` have been collected."""
    shuffled = sorted(set(paths))
    random.Random(seed).shuffle(shuffled)
    texts, total = [], 0
    for path in shuffled:
        if total >= characters:
            break
        text = read_text(path)
        if text is not None:
            texts.append(text)
            total += len(text)
    return texts


def build_corpus(extra: Path | None, characters: int, seed: int = 0) -> Corpus:
    """The target's training text: `characters` per domain at most, weighted for drawing."""
    corpus = Corpus()
    corpus.documents["python"] = sample_texts(python_files(), characters, seed)
    corpus.documents["cpp"] = sample_texts(cpp_files(), characters, seed)
    corpus.weights = {"python": 0.45, "cpp": 0.35}
    if extra is None:
        return corpus
    corpus.documents["python"] += _gzip_texts(extra / "python_algorithms.jsonl.gz")
    corpus.documents["markdown"] = _gzip_texts(extra / "rust_rfcs.jsonl.gz")
    corpus.documents["maths"] = [
        f"<|user|>{row['question']}<|assistant|>{row['answer']}"
        for row in _jsonl((extra / "gsm8k" / "train.jsonl").read_text(encoding="utf-8"))
    ]
    corpus.weights |= {"markdown": 0.1, "maths": 0.1}
    return corpus


def _jsonl(text: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _gzip_texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [row["text"][:MAX_CHARS] for row in _jsonl(file.read())]
