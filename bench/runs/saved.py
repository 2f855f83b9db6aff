"""A finished run, read back from its folder: the report, and the raw measurements beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.report.files import read_report
from bench.report.older import measurements_as_today
from bench.report.schema import Report
from drafts.files import read_json


@dataclass(frozen=True)
class SavedRun:
    """A report with the name by which a comparison calls it."""

    name: str
    path: Path
    report: Report


def read_run(path: Path) -> SavedRun:
    """A run from its report.json or its folder. Raises `UserError` for what is no report.

    `measurements.json` is read where it lies beside; without it `report.measurements` is empty.
    """
    file = path / "report.json" if path.is_dir() else path
    report = read_report(file)
    beside = file.parent / "measurements.json"
    if file.name == "report.json" and beside.is_file():
        report.measurements = measurements_as_today(read_json(beside))
    name = file.resolve().parent.name if file.name == "report.json" else file.stem
    return SavedRun(name or "run", file, report)


def read_runs(paths: Sequence[Path]) -> list[SavedRun]:
    """Several runs, as `named_apart`."""
    return named_apart([read_run(path) for path in paths])


def named_apart(runs: Sequence[SavedRun]) -> list[SavedRun]:
    """Those of one name are called by their paths."""
    names = [run.name for run in runs]
    return [run if names.count(run.name) == 1 else replace(run, name=str(run.path)) for run in runs]
