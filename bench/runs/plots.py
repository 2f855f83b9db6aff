"""Plots of several runs: each arm's figure, a dot per run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.report.plots.style import MARKERS, SPARE_COLOURS, Series, as_svg, dots, measured, styled

if TYPE_CHECKING:
    from bench.runs.saved import SavedRun


PANELS = (
    ("acceptance_length", "Acceptance length", "tokens per target step"),
    ("speedup", "Speedup over no speculation", "times as fast"),
    ("tokens_per_second", "Decoding speed", "tokens per second"),
)


def svg_comparison(runs: Sequence[SavedRun]) -> list[str]:
    """An SVG element per figure that any run measured."""
    labels = {arm["name"]: arm["label"] for run in runs for arm in run.report.arms}
    colours = (SPARE_COLOURS * len(runs))[: len(runs)]
    plots = []
    with styled():
        for key, title, unit in PANELS:
            found = [
                {
                    arm["name"]: arm[key]
                    for arm in run.report.arms
                    if measured(arm[key]) and not (key == "speedup" and _plain(arm))
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
            figure, axes = dots([labels[name] for name in names], series)
            axes.set_title(title)
            axes.set_xlabel(unit)
            plots.append(as_svg(figure, f"{title} of each arm in each run", key))
    return plots


def _plain(arm: dict) -> bool:
    return arm["provenance"]["method"] is None
