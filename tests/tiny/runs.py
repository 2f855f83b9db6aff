"""Fresh tiny drafts on disk, and short training runs of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from afaspec.train.config import TrainConfig
from drafts.checkpoint.family import InitOptions
from drafts.registry import save_draft
from tests.opened import init_draft, train


def write_fresh(
    family: str, folder: Path, target: Path, *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """A fresh draft of `family` for `target`; `options` are those of `InitOptions`."""
    folder.mkdir()
    save_draft(init_draft(family, target, InitOptions(**options)), family, folder, dtype=dtype)
    return folder


def run_losses(store: Path, draft: Path, out: Path, **settings: Any) -> list[float]:
    """Train for a moment into `out`; the loss of each step."""
    defaults: dict[str, Any] = {"steps": 30, "eval_every": 30, "rank": 4, "batch_size": 4}
    defaults |= {"compiled": False, "tensorboard": False}
    rows: list[dict[str, Any]] = []
    train(TrainConfig(store=store, draft=draft, out=out, **(defaults | settings)), rows.append)
    return [row["loss"] for row in rows]
