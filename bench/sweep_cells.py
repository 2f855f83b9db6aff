"""What a cell of a sweep measured, and its file: written whole, read back by reports and what-ifs.

A cell is measured in waves: as many requests as its concurrency start together, and the next wave
starts when all have ended. So the number that runs at each step follows from the steps of each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.acceptance import Acceptance, Counts, Floats
from drafts.errors import UserError
from drafts.files import atomic_file, read_json

CELL_SCHEMA = "afaspec-sweep-cell/1"


@dataclass
class Series:
    """One arm's raw numbers: lists by round, then prompt (`wave_seconds`: wave).

    `tokens` and `seconds` are those of a request's decode phase, which starts at its first token;
    `wave_seconds` run from a wave's first token to its last. The counters are zero without a draft.
    """

    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    wave_seconds: list[list[float]] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    drafted: list[list[int]] = field(default_factory=list)
    accepted: list[list[list[int]]] = field(default_factory=list)

    @property
    def steps(self) -> Counts:
        """[rounds, prompts]: steps of the target after the first token.

        A step without a draft yields one token (n-gram often has none to propose); the last step
        of an answer may yield tokens that are cut off.
        """
        accepted = np.array([[sum(row) for row in rows] for rows in self.accepted])
        return np.maximum(np.array(self.drafts), np.array(self.tokens) - accepted)

    def acceptance(self) -> Acceptance:
        """Counts per prompt over all rounds."""
        return Acceptance(
            np.array(self.drafts).sum(axis=0),
            np.array(self.accepted).sum(axis=0),
            np.array(self.drafted).sum(axis=0),
        )


@dataclass
class CellResult:
    """A finished cell. `refused` says why it cannot run; then there are no series.

    `draft` is what `bench.sweep_draft.describe_draft` says of it.
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
            mend="remove it, or give the folder that `afaspec sweep` wrote",
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
            mend="run `afaspec sweep ... --out FOLDER` first, and give that folder",
        )
    return [read_cell(path) for path in paths]
