"""Runs side by side for readers: a table for the console, a page, and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from bench.records.speeds import RATES, SPEEDUPS
from bench.report.console import cell_text
from bench.report.html import PageTable, render, write_page
from bench.report.plots.style import as_svgs
from bench.report.words import MARKS, TableCell, figure_cell
from bench.runs.compare import NAMES, Change, ReportComparison, by_how_much
from bench.runs.plots import comparison_plots
from bench.stats.verdict import NO_DIFFERENCE
from drafts.files import write_json

FORMS = (
    {"acceptance_length": "{:.2f}"}
    | dict.fromkeys(RATES, "{:,.1f}")
    | dict.fromkeys(SPEEDUPS, "{:.2f}×")
)


def write_comparison(found: ReportComparison, folder: Path) -> Path:
    """Write comparison.json and comparison.html, each atomically; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = write_page(render_comparison(found), folder / "comparison.html")
    write_json(folder / "comparison.json", found.as_json())
    return page


def render_comparison(found: ReportComparison) -> str:
    """The page: what changed, a table, plots, and the settings that differ."""
    return render(
        "comparison.html",
        headline=headline(found),
        settings=" · ".join(
            f"{run.name}: measured at {run.report.provenance.get('time', 'an unknown time')}"
            for run in found.runs
        ),
        verdicts=[
            (change.comparison.verdict, f"{change.words}.")
            for change in found.changes
            if change.comparison.verdict != NO_DIFFERENCE
        ],
        cautions=[f"{text}." for text in found.cautions],
        changes=PageTable(columns(found), rows(found)) if found.changes else None,
        plots=as_svgs(comparison_plots(found.runs)),
        missing=[f"{text}." for text in found.missing],
        settings_that_differ=_settings_that_differ(found),
    )


def headline(found: ReportComparison) -> str:
    """One sentence: how many figures changed, and which way."""
    verdicts = [change.comparison.verdict for change in found.changes]
    if not verdicts:
        return "The runs have no arm in common that both measured."
    higher, lower = verdicts.count("higher"), verdicts.count("lower")
    text = f"Of {len(verdicts)} figures that both runs have, {higher} are higher"
    if len(found.runs) > 2:
        text = f"Of {len(verdicts)} figures shared with {found.runs[0].name}, {higher} are higher"
    text += f", {lower} lower, and {len(verdicts) - higher - lower} show no difference."
    if found.settings:
        text += " The runs' settings are not the same."
    return text


def columns(found: ReportComparison) -> list[str]:
    """The table's columns: the two runs by name where there are two."""
    if len(found.runs) == 2:
        return ["Arm", "Measure", *(run.name for run in found.runs), "Difference", "Verdict"]
    return ["Arm", "Measure", "Run", f"There, in {found.runs[0].name}", "Difference", "Verdict"]


def rows(found: ReportComparison) -> list[list[TableCell]]:
    """A row per arm, measure and later run."""
    return [_row(change, len(found.runs) == 2) for change in found.changes]


def render_table(found: ReportComparison) -> Table:
    """The table for a console of 80 columns: the verdict is a mark before the difference."""
    how = {True: "the same prompts, paired", False: "unpaired"}
    kinds = " and ".join(dict.fromkeys(how[change.paired] for change in found.changes))
    shown = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        caption=f"▲ ▼ shown, = no difference shown; 95% intervals; {kinds}",
    )
    for index, column in enumerate(columns(found)[:-1]):
        shown.add_column(column, justify="left" if index < 2 else "right", no_wrap=index > 1)
    styles = {"higher": "bold green", "lower": "bold red"}
    for change, (*cells, difference, _) in zip(found.changes, rows(found), strict=True):
        verdict = change.comparison.verdict
        mark = f"{MARKS.get(verdict, '=')} "
        last = cell_text(difference, styles.get(verdict, ""), mark)
        shown.add_row(*map(cell_text, cells), last)
    return shown


def _settings_that_differ(found: ReportComparison) -> PageTable | None:
    """A row per setting that differs, a column per run."""
    if not found.settings:
        return None
    texts = [[name, *map(_said, values)] for name, values in found.settings.items()]
    return PageTable(["Setting", *(run.name for run in found.runs)], texts)


def _row(change: Change, two: bool) -> list[TableCell]:
    form = FORMS[change.comparison.metric]
    old, new = (figure_cell(figure, form) for figure in change.values)
    middle = [old, new] if two else [TableCell(change.new, ""), old]
    verdict = change.comparison.verdict
    return [
        TableCell(change.label),
        TableCell(NAMES[change.comparison.metric]),
        *middle,
        _difference(change),
        TableCell(verdict, "paired" if change.paired else "unpaired", best=verdict == "higher"),
    ]


def _difference(change: Change) -> TableCell:
    value, _, interval = by_how_much(change.comparison).partition(" ")
    return TableCell(value.rstrip(","), interval.strip("()"))


def _said(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)
