"""A sweep as one HTML page: what to set first, then plots, every cell, and how it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report.markup import definitions, page, paragraph, plain_table, plot_grid, section, table
from bench.report.words import Cell
from bench.sweep.plots import cells_of, condition_name, svg_plots
from drafts.files import atomic_file

if TYPE_CHECKING:
    from bench.sweep.schema import Sweep


Json = dict[str, Any]
NOTE = (
    "A wave is as many requests as the concurrency says, started together. Speedup compares one "
    "request's tokens per second with and without the draft, wave by wave, both measured in turns. "
    "Ranges are 95% intervals over waves of prompts. Below each speedup stand the tokens per "
    "second of one request."
)
SCHEDULE = (
    "In vLLM's terms, as num_speculative_tokens_per_batch_size of the speculative config: "
    "[from, to, k] requests at once, 0 where the draft costs time."
)


def write_page(sweep: Sweep, path: Path) -> Path:
    """Write the page atomically; returns `path`."""
    with atomic_file(path) as temporary:
        temporary.write_text(render_page(sweep), encoding="utf-8")
    return path


def headline(sweep: Sweep) -> str:
    """One sentence: the highest speedup measured, and where."""
    cells = [cell for cell in sweep.cells if cell["speedup"] is not None]
    if not cells:
        return "No cell of this sweep could run."
    top = max(cells, key=lambda cell: cell["speedup"]["value"])
    figure = top["speedup"]
    text = (
        f"{top['label']} decodes {figure['value']:.2f}× as fast as no speculation with "
        f"k={top['k']} at concurrency {top['concurrency']}"
    )
    loads = {cell["concurrency"] for cell in cells}
    worst = max(loads)
    if worst != top["concurrency"]:
        there = max(cell["speedup"]["value"] for cell in cells if cell["concurrency"] == worst)
        text += f", and at best {there:.2f}× at concurrency {worst}"
    return f"{text}."


def render_page(sweep: Sweep) -> str:
    """The whole page as text."""
    parts = [plot_grid(svg_plots(sweep))]
    for finding in sweep.findings:
        said = " ".join([*finding["words"], finding["advice"]])
        steps = finding["num_speculative_tokens_per_batch_size"]
        parts.append(
            section(
                f"{finding['label']}: {condition_name(finding)}",
                paragraph(said),
                _speedups(sweep, finding),
                paragraph(NOTE, "note"),
                paragraph(f"{SCHEDULE} {steps}", "note") if len(steps) > 1 else "",
            )
        )
    refused = [
        [cell["label"], str(cell["k"]), str(cell["concurrency"]), cell["refused"]]
        for cell in sweep.cells
        if cell["refused"]
    ]
    if refused:
        rows = plain_table(("Draft", "k", "Concurrency", "Reason"), refused)
        parts.append(section("Cells that could not run", rows))
    parts.append(section("How it was measured", definitions(sweep.provenance)))
    return page(
        title="Sweep",
        headline=headline(sweep),
        settings=_settings(sweep),
        body="\n".join(parts),
        foot=f"Measured at {sweep.provenance['time']}. The same figures are in sweep.json.",
    )


def _speedups(sweep: Sweep, finding: Json) -> str:
    cells = {(cell["k"], cell["concurrency"]): cell for cell in cells_of(sweep, finding)}
    loads = sorted({load for _, load in cells})
    best = {(load["k"], load["concurrency"]) for load in finding["loads"]}
    alike = {(k, load["concurrency"]) for load in finding["loads"] for k in load["tied"]}
    rows = []
    for k in sorted({k for k, _ in cells}):
        first = next(cells[k, load] for load in loads if (k, load) in cells)
        row = [Cell(f"k={k}"), _figure(first["acceptance_length"], "{:.2f}")]
        for load in loads:
            cell = cells.get((k, load))
            row.append(_speedup(cell, (k, load) in best | alike) if cell else Cell("–"))
        rows.append(row)
    columns = ("k", "Acceptance length", *(f"Speedup at {load}" for load in loads))
    return table(columns, rows)


def _speedup(cell: Json, best: bool) -> Cell:
    figure, speed = cell["speedup"], cell["tokens_per_second"]["value"]
    found = _figure(figure, "{:.2f}×")
    return Cell(found.text, f"{found.detail}, {speed:,.1f} tokens/s".lstrip(", "), best)


def _figure(figure: Json, form: str) -> Cell:
    if figure["value"] is None:
        return Cell("–")
    value = form.format(figure["value"])
    if figure["low"] is None:
        return Cell(value)
    low, high = (form.format(figure[end]) for end in ("low", "high"))
    return Cell(value, f"{low.rstrip('×')}–{high}")


def _settings(sweep: Sweep) -> str:
    p = sweep.provenance
    rounds = f"{p['rounds']} round" + ("s" if p["rounds"] != 1 else "")
    return f"{p['prompts']} prompts, {rounds}, {p['dtype']}, {len(sweep.cells)} cells"
