"""Plots of several runs: each arm's figure, a dot per run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bench.records.speeds import MEASURES, RATES, SPEEDUPS
from bench.report.plots.style import MARKERS, SPARE_COLOURS, Plot, Series, dots, measured
from bench.report.words import is_plain
from bench.runs.saved import SavedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PANELS = (
    ("acceptance_length", "Acceptance length", "tokens per target step"),
    *((key, f"{MEASURES[key]} over no speculation", "times as fast") for key in SPEEDUPS),
    *((key, MEASURES[key], "tokens per second") for key in RATES),
)


def comparison_plots(runs: Sequence[SavedRun]) -> Iterator[Plot]:
    """A plot per figure that any run measured."""
    labels = {arm["name"]: arm["label"] for run in runs for arm in run.report.arms}
    colours = (SPARE_COLOURS * len(runs))[: len(runs)]
    for key, title, unit in PANELS:
        found = [
            {
                arm["name"]: arm[key]
                for arm in run.report.arms
                if measured(arm[key]) and not (key in SPEEDUPS and is_plain(arm))
            }
            for run in runs
        ]
        names = [name for name in labels if any(name in figures for figures in found)]
        if not names:
            continue
        series = [
            Series(run.name, colour, marker, [figures.get(name) for name in names])
            for run, colour, marker, figures in zip(
                runs, colours, MARKERS * len(runs), found, strict=False
            )
        ]
        rows = [labels[name] for name in names]
        yield key, f"{title} of each arm in each run", partial(_panel, rows, series, title, unit)


def _panel(rows: Sequence[str], series: Sequence[Series], title: str, unit: str) -> Figure:
    figure, axes = dots(rows, series)
    axes.set_title(title)
    axes.set_xlabel(unit)
    return figure
