"""A report's figures as one tidy table: report.csv, a row per arm, part of the run and measure."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.records.speeds import FIGURES as SPEED_FIGURES
from bench.records.speeds import SPEEDUPS
from bench.report.schema import Report
from drafts.files import atomic_file

COLUMNS = ("arm", "against", "load", "category", "measure", "value", "low", "high")
FIGURES = (
    "acceptance_length",
    "acceptance_rate",
    "tokens_per_step",
    "offline_acceptance_length",
    *SPEED_FIGURES,
    "requests_per_second",
    "prefill_ms",
)
PER_POSITION = ("per_position", "conditional")

Json = Mapping[str, Any]
Row = dict[str, Any]


def write_csv(report: Report, path: Path) -> Path:
    """Write all rows atomically; returns `path`. What was not measured is an empty field."""
    with (
        atomic_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(csv_rows(report))
    return path


def csv_rows(report: Report) -> Iterator[Row]:
    """Rows by column name. `load` is empty for the run itself, else as `concurrency=4`.

    `against` names the other arm of a comparison, whose measures end in `_difference` and
    `_relative`. Counts and latencies have a value and no interval.
    """
    for arm in report.arms:
        yield from _arm_rows(arm)
    for found in report.comparisons:
        arm, against, metric = found["arm"], found["against"], found["metric"]
        for kind in ("relative",) if metric in SPEEDUPS else ("difference", "relative"):
            yield _row(arm, f"{metric}_{kind}", found[kind], against=against)
    for step in report.load or []:
        load = next(
            f"{name}={step[name]}" for name in ("concurrency", "request_rate") if name in step
        )
        for arm in step["arms"]:
            yield from _arm_rows(arm, load)


def _arm_rows(arm: Json, load: str = "") -> Iterator[Row]:
    name = arm["name"]
    for measure in FIGURES:
        if arm.get(measure):
            yield _row(name, measure, arm[measure], load=load)
    for measure in ("acceptance_length", "kept"):
        if figure := (arm.get("general") or {}).get(measure):
            yield _row(name, f"general_{measure}", figure, load=load)
    for measure in PER_POSITION:
        for position, figure in enumerate(arm.get(measure) or [], start=1):
            yield _row(name, f"{measure}_{position}", figure, load=load)
    for tokens, count in enumerate((arm.get("accepted_lengths") or {}).get("per_step") or []):
        yield _row(name, f"steps_accepting_{tokens}", count, load=load)
    for measure, spread in (arm.get("latency") or {}).items():
        if isinstance(spread, Mapping):
            for share, value in spread.items():
                yield _row(name, f"{measure.removesuffix('_ms')}_{share}_ms", value, load=load)
        elif spread is not None:  # how many requests there were, and how many failed
            yield _row(name, measure, spread, load=load)
    if lossless := arm.get("lossless"):
        yield _row(name, "outputs_compared", lossless["prompts"], load=load)
        yield _row(name, "outputs_same", lossless["matching"], load=load)
    for category, figures in (arm.get("categories") or {}).items():
        for measure, figure in figures.items():
            if figure is not None:
                yield _row(name, measure, figure, load=load, category=category)


def _row(arm: str, measure: str, found: Json | float, **place: str) -> Row:
    """`place`: the load, the category and whom the arm is held against, empty where not given."""
    figure = found if isinstance(found, Mapping) else {"value": found, "low": None, "high": None}
    ends = {part: figure[part] for part in ("value", "low", "high")}
    return {**dict.fromkeys(COLUMNS, ""), "arm": arm, "measure": measure, **place, **ends}
