"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import page_sections as parts
from bench.report.markup import page, plot_grid, section
from bench.report.plots import svg_plots
from bench.report.words import headline, settings_line
from drafts.files import atomic_file

if TYPE_CHECKING:
    from bench.report.schema import Report


FIRST = ("acceptance_length", "speedup")  # the plots that stand right below the table


def write_page(report: Report, path: Path) -> Path:
    """Write the page atomically; returns `path`."""
    with atomic_file(path) as temporary:
        temporary.write_text(render_page(report), encoding="utf-8")
    return path


def render_page(report: Report) -> str:
    """The page: what was found, a table, plots, details, and how it was measured."""
    plots = dict(svg_plots(report))
    first = [plots.pop(stem) for stem in FIRST if stem in plots]

    def grid(*stems: str) -> str:
        return plot_grid([plots[stem] for stem in stems if stem in plots])

    body = [
        parts.verdicts(report),
        parts.warnings(report),
        parts.main_table(report),
        plot_grid(first),
        section("By category", parts.categories(report), grid("categories")),
        section(
            "Acceptance in detail",
            grid("per_position", "conditional", "accepted_per_step", "per_request"),
        ),
        section("Speed and latency", parts.latencies(report), grid("tokens_per_second", "latency")),
        section(
            "Under load",
            grid(*(stem for stem in plots if stem.startswith("load_"))),
            parts.load(report),
        ),
        section("Training", grid("training")),
        section("Where outputs differ", parts.differences(report)),
        section("Sampling at temperature", parts.distribution(report)),
        section("How it was measured", parts.provenance(report)),
    ]
    return page(
        "Draft benchmark",
        headline(report.arms),
        settings_line(report.provenance),
        "\n".join(part for part in body if part),
        f"Measured at {report.provenance['time']}. The same figures are in report.json and "
        "report.csv.",
    )
