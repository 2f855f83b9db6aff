"""What a run writes while it trains, a row a step, and what is read from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from afaspec.train.config import TrainConfig

METRICS = "metrics.jsonl"
CURVE = ("step", "loss", "lr", "acceptance_length", "beta")
Report = Callable[[dict[str, Any]], None]


class Metrics:
    """`metrics.jsonl` and TensorBoard events; rows after the resumed checkpoint are dropped.

    Row 0 is the base draft's; at step 0 itself the log begins anew.
    """

    def __init__(self, config: TrainConfig, step: int, report: Report):
        path, self.report = config.out / METRICS, report
        rows = path.read_text().splitlines() if path.exists() else []
        whole = [row for row in rows if row.endswith("}")]
        kept = [row for row in whole if step and json.loads(row)["step"] <= step]
        path.write_text("".join(row + "\n" for row in kept))
        self.file = path.open("a", buffering=1)
        self.writer: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = step + 1 if step else 0
            self.writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=purge)

    def add(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        if self.writer:
            for key, value in row.items():
                if key != "step" and isinstance(value, float):
                    self.writer.add_scalar(key, value, row["step"])
        if row["step"]:
            self.report(row)

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()


def training_curve(
    run: Path, keys: Sequence[str] = CURVE, points: int | None = None
) -> dict[str, list[Any]]:
    """The metrics of a run by step, as a report keeps them; None where there is no number.

    Beside `keys` it has the lengths on stores of `mix`, such as `general/acceptance_length`. With
    `points` only about so many steps are kept, and all that were evaluated; losses then have five
    decimals.
    """
    rows = read_rows(run / METRICS)
    watched = [key for key in (rows[0] if rows else {}) if key.endswith("/acceptance_length")]
    if points is not None:
        stride = -(-len(rows) // points)
        kept = [row for row in rows if row["step"] % stride == 0 or "acceptance_length" in row]
        rows = [row | {"loss": round(row["loss"], 5)} if "loss" in row else row for row in kept]
    return {key: [_finite(row.get(key)) for row in rows] for key in (*keys, *watched)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
