"""study.csv: one row per domain, arm and seed."""

from __future__ import annotations

import csv
from pathlib import Path

from afaspec.compare.plan import Json
from drafts.files import atomic_file

COLUMNS = (
    "domain",
    "arm",
    "rank",
    "steps",
    "samples",
    "learning_rate",
    "seed",
    "acceptance_length",
    "trainable_parameters",
    "train_seconds",
    "mean",
    "low",
    "high",
    "gain_over_base",
    "gap_closed",
)


def write_csv(study: Json, path: Path) -> None:
    """Write the table, atomically. `mean`, `low` and `high` are the arm's, over its seeds."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for domain, results in study["domains"].items():
            writer.writerow({"domain": domain, **_row("base", results["base"], 0)})
            for arm in results["arms"]:
                for i, seed in enumerate(study["settings"]["seeds"]):
                    row = _row(arm["arm"], arm, i) | {"domain": domain, "seed": seed}
                    row |= {name: arm[name] for name in COLUMNS[2:6]}
                    row["trainable_parameters"] = arm["trainable_parameters"]
                    row["train_seconds"] = arm["train_seconds"][i]
                    row["gain_over_base"] = arm["over_base"]["difference"]["value"]
                    row["gap_closed"] = (arm["gap_closed"] or {}).get("value")
                    writer.writerow(row)


def _row(name: str, arm: Json, i: int) -> Json:
    length = arm["acceptance_length"]
    figures = {"mean": length["value"], "low": length["low"], "high": length["high"]}
    return {"arm": name, "acceptance_length": arm["by_seed"][i], **figures}
