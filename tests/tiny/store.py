"""A small real feature store of a tiny target's greedy answers."""

from __future__ import annotations

from pathlib import Path

from afaspec.capture.config import CaptureConfig
from tests.opened import capture


def write_store(folder: Path, target: Path, draft: Path, prompts: int = 24) -> Path:
    """Capture `prompts` short answers of `target` with the layers of `draft`."""
    rows = folder.with_suffix(".jsonl")
    texts = (f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(prompts))
    rows.write_text("".join(texts))
    capture(
        CaptureConfig(
            target=str(target),
            prompts=str(rows),
            out=folder,
            draft=draft,
            max_new_tokens=20,
            batch_size=8,
            shard_mib=1,
            device="cpu",
        )
    )
    return folder
