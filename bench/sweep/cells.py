"""What a cell of a sweep measured, and its file: written whole, read back by reports and what-ifs.

A cell is measured in waves: as many requests as its concurrency start together, and the next wave
starts when all have ended. So the number that runs at each step follows from the steps of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.records.acceptance import Counts, Floats
from bench.records.arms import Arm
from bench.records.run import Series
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import open_source
from drafts.errors import UserError
from drafts.files import atomic_file, read_json
from drafts.registry import module_names

CELL_SCHEMA = "afaspec-sweep-cell/1"
PLAIN_GRAPHS = "plain_graph_sizes"  # in a cell's engine: those of the one without a draft


@dataclass
class CellResult:
    """A finished cell. `refused` says why it cannot run; then there are no series.

    `draft` is what `bench.sweep.cells.describe_draft` says of it.
    """

    arm: str
    label: str
    k: int
    sample_method: str | None
    temperature: float
    concurrency: int
    max_tokens: int
    draft: dict[str, Any]
    refused: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    none: Series | None = None
    series: Series | None = None

    @property
    def condition(self) -> tuple[float, int, str | None]:
        """What sets cells apart besides arm, k and concurrency."""
        return self.temperature, self.max_tokens, self.sample_method


def occupancy(steps: Sequence[float] | np.ndarray) -> float:
    """How many requests of a wave run at a step, from the steps that each one takes.

    The mean over the steps of all requests: what the steps that a request takes part in cost is
    linear in the number that run, so the mean cost is the cost at this number.
    """
    ends = np.sort(np.asarray(steps, dtype=np.float64))
    spans = np.diff(np.concatenate([[0.0], ends]))
    running = np.arange(len(ends), 0, -1)
    return float((running**2 * spans).sum() / (running * spans).sum())


def mean_occupancy(steps: Floats | Counts, concurrency: int) -> float:
    """`occupancy` over the waves of [rounds, prompts] steps, weighted by the steps in each."""
    waves = np.asarray(steps, dtype=np.float64).reshape(-1, concurrency)
    waves = waves[waves.sum(axis=1) > 0]
    values = np.array([occupancy(wave) for wave in waves])
    return float(np.average(values, weights=waves.sum(axis=1)))


def write_cell(path: Path, result: CellResult) -> None:
    """Write the cell's file, atomically."""
    with atomic_file(path) as temporary:  # long lists of numbers: no indent
        text = json.dumps({"schema": CELL_SCHEMA, **asdict(result)})
        temporary.write_text(text + "\n", encoding="utf-8")


def read_cell(path: Path) -> CellResult:
    """A cell from its file. Raises `UserError` for anything else."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != CELL_SCHEMA:
        raise UserError(
            f"is no cell of a sweep ({CELL_SCHEMA})",
            where=path,
            hint="remove it, or give the folder that `afaspec sweep` wrote",
        )
    del content["schema"]
    for name in ("none", "series"):
        if content[name] is not None:
            content[name] = Series(**content[name])
    return CellResult(**content)


def read_cells(folder: Path) -> list[CellResult]:
    """All finished cells of a sweep's folder. Raises `UserError` where there are none."""
    paths = sorted((folder / "cells").glob("*.json"))
    if not paths:
        raise UserError(
            "holds no measured cells of a sweep",
            where=folder,
            hint="run `afaspec sweep ... --out FOLDER` first, and give that folder",
        )
    return [read_cell(path) for path in paths]


ONE_PASS = (
    "peagle",
    "dflash",
    "dspark",
    "pard",
)  # families that draft all tokens in one forward pass


def describe_draft(arm: Arm) -> dict[str, Any]:
    """Identity and cost class: drafts of one `shape` have the same layers of the same sizes.

    `one_pass` says that k tokens take one forward pass; other drafts run one after the other.
    `max_k` is the most tokens that it drafts in a step, None for any number; `fields` are the arm's
    own of vLLM's `speculative_config`, if any.
    """
    fields = {"fields": dict(arm.fields)} if arm.fields else {}
    if not isinstance(arm.draft, DraftInfo):
        named = {"family": arm.draft, "shape": arm.draft, "one_pass": arm.draft != "mtp"}
        return {"sha256": None, **named, "max_k": None, **fields}
    info = arm.draft
    names = module_names(info)
    headers = open_source(info.folder).headers
    shapes = sorted((names[stored], list(header.shape)) for stored, header in headers.items())
    return {
        "sha256": info.sha256,
        "family": info.family,
        "shape": hashlib.sha256(json.dumps([info.family, shapes]).encode()).hexdigest()[:12],
        "one_pass": info.family in ONE_PASS,
        "max_k": info.max_k,
        **fields,
    }
