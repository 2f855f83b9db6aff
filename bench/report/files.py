"""A report's files: report.json, measurements, plots, page and CSV."""

from __future__ import annotations

from pathlib import Path

from bench.records.plain import write_streamed
from bench.report.older import as_today
from bench.report.schema import OLDER_SCHEMAS, SCHEMA, Report
from drafts.errors import UserError
from drafts.files import atomic_file, read_json, write_json

NEEDED = ("arms", "provenance", "numerical_noise", "training")


def read_report(path: Path) -> Report:
    """A report from its JSON file; one of an older schema reads as one that measured less.

    Raises `UserError` for another schema.
    """
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (SCHEMA, *OLDER_SCHEMAS):
        raise UserError(
            f"has schema {schema!r}, expected {SCHEMA!r}",
            where=path,
            hint="give a report.json that `afaspec bench` wrote",
        )
    if missing := [name for name in NEEDED if name not in content]:
        raise UserError(
            f"has no {missing[0]}", where=path, hint="give the file whole, as it was written"
        )
    if schema != SCHEMA:
        content = as_today(content)
    return Report(
        content["arms"],
        content["provenance"],
        content["numerical_noise"],
        content["training"],
        content.get("comparisons", []),
        content.get("load"),
        content.get("example"),
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write measurements, plots, page, CSV and report.json, each atomically; returns the page.

    report.json comes last: where it exists, the rest is there too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if report.measurements:
        with (
            atomic_file(folder / "measurements.json") as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            write_streamed(report.measurements, file)  # may be larger than what is in memory
            file.write("\n")
    page = render_report(report, folder)
    write_json(folder / "report.json", report.as_json())
    return page


def render_report(report: Report, folder: Path) -> Path:
    """Write what can be made from a report alone: plots, page and CSV; returns the page."""
    from bench.report.csv import write_csv
    from bench.report.html import write_page
    from bench.report.page import render_page
    from bench.report.plots import report_plots
    from bench.report.plots.style import write_pngs

    write_pngs(report_plots(report), folder)
    write_csv(report, folder / "report.csv")
    return write_page(render_page(report), folder / "report.html")
