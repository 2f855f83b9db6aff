"""A small real feature store of a tiny target's greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afaspec.capture.config import CaptureConfig
from tests.opened import capture


def write_store(
    folder: Path,
    target: Path,
    draft: Path | None,
    prompts: int = 24,
    word: str = "def",
    **changes: Any,
) -> Path:
    """Capture `prompts` short answers of `target` with the layers of `draft`.

    Prompts begin with `word`; `changes` are settings of the capture.
    """
    rows = folder.with_suffix(".jsonl")
    texts = (f'{{"prompt": "{word} f{i}(x, y): return x[{i}]"}}\n' for i in range(prompts))
    rows.write_text("".join(texts))
    settings: dict[str, Any] = {"draft": draft, "max_new_tokens": 20, "batch_size": 8}
    settings |= {"shard_mib": 1, "device": "cpu"}
    where = {"target": str(target), "prompts": str(rows), "out": folder}
    capture(CaptureConfig(**(settings | where | changes)))
    return folder
