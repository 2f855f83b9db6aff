"""The tokenizer in a model's folder: its files, and its vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from drafts.files import read_json

PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files of the model in `source`, chat templates included."""
    for pattern in PATTERNS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def vocabulary(folder: Path) -> dict[str, Any] | list[Any] | None:
    """Token to id (or a list of tokens) by tokenizer.json; None where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    model = read_json(path).get("model") or {}
    return model.get("vocab") or None
