"""`--gate`: what `afaspec bench` and `afaspec report` do with a baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field

from bench.records.settings import Settings
from bench.runs.saved import SavedRun, read_runs


class GateSettings(Settings):
    """What a run is held against."""

    GROUP: ClassVar[str] = "Report"

    gate: list[Path] = Field(
        [],
        description="report.json of a baseline: exit code 3 if this run is worse beyond its "
        "interval; repeat it with more runs of the same, so that what differs between runs counts",
    )
    gate_tolerance: float = Field(
        0.0, ge=0, le=1, description="relative loss that the gate lets pass: 0.02 is 2%"
    )


def read_baselines(
    paths: Sequence[Path], settings: Mapping[str, Any] | None = None
) -> list[SavedRun]:
    """The baselines of `--gate`. Raises `UserError` where `settings` are not their own.

    `settings` are those known before anything is measured, by the names that
    `bench.runs.gate.SETTINGS` has.
    """
    from bench.runs.gate import require_comparable

    baselines = read_runs(paths)
    for baseline in baselines:
        require_comparable(baseline, settings or {})
    return baselines


def hold(baselines: Sequence[SavedRun], new: SavedRun, tolerance: float) -> None:
    """Print what the gate finds; leaves with `bench.runs.gate.EXIT_CODE` on a regression."""
    from afaspec.cli.console import note
    from bench.runs.gate import EXIT_CODE, check

    baseline, *again = baselines
    found = check(baseline, new, tolerance, again)
    where = ", ".join(str(run.path) for run in baselines)
    for words in found.checked:
        note(f"{words}.")
    if found.passed:
        note(f"Gate passed: nothing is worse than in {where}.")
        return
    note(f"Gate failed against {where}:")
    for words in found.failures:
        note(f"  {words}")
    raise typer.Exit(EXIT_CODE)
