"""`--gate`: what `afaspec bench` and `afaspec report` do with a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import typer
from pydantic import Field

from bench.records.settings import Settings
from bench.runs.saved import SavedRun, read_run


class GateSettings(Settings):
    """What a run is held against."""

    GROUP: ClassVar[str] = "Report"

    gate: Path | None = Field(
        None,
        description="report.json of a baseline: exit code 3 if this run is worse beyond its "
        "interval",
    )
    gate_tolerance: float = Field(
        0.0, ge=0, le=1, description="relative loss that the gate lets pass: 0.02 is 2%"
    )


def read_baseline(path: Path | None, settings: Mapping[str, Any] | None = None) -> SavedRun | None:
    """The baseline of `--gate`, None without. Raises `UserError` where `settings` are not its own.

    `settings` are those known before anything is measured, by the names that
    `bench.runs.gate.SETTINGS` has.
    """
    from bench.runs.gate import require_comparable

    if path is None:
        return None
    baseline = read_run(path)
    require_comparable(baseline, settings or {})
    return baseline


def hold(baseline: SavedRun, new: SavedRun, tolerance: float) -> None:
    """Print what the gate finds; leaves with `bench.runs.gate.EXIT_CODE` on a regression."""
    from afaspec.cli.console import note
    from bench.runs.gate import EXIT_CODE, check

    found = check(baseline, new, tolerance)
    for words in found.checked:
        note(f"{words}.")
    if found.passed:
        note(f"Gate passed: nothing is worse than in {baseline.path}.")
        return
    note(f"Gate failed against {baseline.path}:")
    for words in found.failures:
        note(f"  {words}")
    raise typer.Exit(EXIT_CODE)
