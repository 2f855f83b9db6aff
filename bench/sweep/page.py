"""sweep.html from a sweep: its values, which bench/report/templates/sweep.html lays out."""

from __future__ import annotations

from typing import Any

from bench.records.speeds import REQUEST
from bench.report.html import PageTable, render
from bench.report.plots.style import as_svgs
from bench.report.words import NOTHING, TableCell, figure_cell
from bench.sweep.plots import cells_of, condition_name, sweep_plots
from bench.sweep.schema import Sweep

Json = dict[str, Any]
REFUSED = ("Draft", "k", "Concurrency", "Reason")


def headline(sweep: Sweep) -> str:
    """One sentence: the highest speedup measured, and where."""
    cells = [cell for cell in sweep.cells if cell[REQUEST.speedup] is not None]
    if not cells:
        return "No cell of this sweep could run."
    top = max(cells, key=lambda cell: cell[REQUEST.speedup]["value"])
    figure = top[REQUEST.speedup]
    text = (
        f"With {top['label']} and k={top['k']} a request is decoded {figure['value']:.2f}× as "
        f"fast as without speculation at concurrency {top['concurrency']}"
    )
    loads = {cell["concurrency"] for cell in cells}
    worst = max(loads)
    if worst != top["concurrency"]:
        there = max(
            cell[REQUEST.speedup]["value"] for cell in cells if cell["concurrency"] == worst
        )
        text += f", and at best {there:.2f}× at concurrency {worst}"
    return f"{text}."


def render_page(sweep: Sweep) -> str:
    """The whole page as text."""
    refused = [
        [cell["label"], str(cell["k"]), str(cell["concurrency"]), cell["refused"]]
        for cell in sweep.cells
        if cell["refused"]
    ]
    return render(
        "sweep.html",
        headline=headline(sweep),
        settings=_settings(sweep),
        plots=as_svgs(sweep_plots(sweep)),
        findings=[
            {
                "heading": f"{finding['label']}: {condition_name(finding)}",
                "words": " ".join([*finding["words"], finding["advice"]]),
                "speedups": _speedups(sweep, finding),
                "schedule": finding["num_speculative_tokens_per_batch_size"],
            }
            for finding in sweep.findings
        ],
        refused=PageTable(REFUSED, refused) if refused else None,
        provenance=sweep.provenance,
    )


def _speedups(sweep: Sweep, finding: Json) -> PageTable:
    """A row per k, a column per concurrency; the best k of each, and those alike, are marked."""
    cells = {(cell["k"], cell["concurrency"]): cell for cell in cells_of(sweep, finding)}
    loads = sorted({load for _, load in cells})
    best = {(load["k"], load["concurrency"]) for load in finding["loads"]}
    alike = {(k, load["concurrency"]) for load in finding["loads"] for k in load["tied"]}
    rows = []
    for k in sorted({k for k, _ in cells}):
        first = next(cells[k, load] for load in loads if (k, load) in cells)
        row = [TableCell(f"k={k}"), figure_cell(first["acceptance_length"], "{:.2f}")]
        for load in loads:
            cell = cells.get((k, load))
            row.append(_speedup(cell, (k, load) in best | alike) if cell else TableCell(NOTHING))
        rows.append(row)
    columns = ("k", "Acceptance length", *(f"{REQUEST.speedup_label} at {load}" for load in loads))
    return PageTable(columns, rows)


def _speedup(cell: Json, best: bool) -> TableCell:
    found, speed = figure_cell(cell[REQUEST.speedup], "{:.2f}×"), cell[REQUEST.rate]["value"]
    return TableCell(found.text, f"{found.detail}, {speed:,.1f} tokens/s".lstrip(", "), best)


def _settings(sweep: Sweep) -> str:
    p = sweep.provenance
    rounds = f"{p['rounds']} round" + ("s" if p["rounds"] != 1 else "")
    return f"{p['prompts']} prompts, {rounds}, {p['dtype']}, {len(sweep.cells)} cells"
