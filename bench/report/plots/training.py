"""Training curves, where a report carries them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.report.plots.style import WIDTH, colours_of, legend_below
from bench.report.schema import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training(report: Report) -> Figure:
    """Curves by arm: `{"step": [...], "loss": [...], "acceptance_length": [...]}`, two panels.

    Entries of `loss` and `acceptance_length` may be None where a step measured only the other. Each
    `NAME/acceptance_length`, on a store that was watched, has a panel of its own.
    """
    from matplotlib import pyplot

    colours = colours_of([{"name": name} for name in report.training])
    labels = {arm["name"]: arm["label"] for arm in report.arms}
    length = "acceptance_length"
    known = dict.fromkeys(key for curve in report.training.values() for key in curve)
    watched = [key for key in known if key.endswith(f"/{length}")]
    panels = [
        (key, title)
        for key, title in (
            ("loss", "Training loss"),
            (length, "Held-out acceptance length"),
            *((key, f"Held-out acceptance length, {key.partition('/')[0]}") for key in watched),
        )
        if any(curve.get(key) for curve in report.training.values())
    ]
    figure, all_axes = pyplot.subplots(
        len(panels), 1, figsize=(WIDTH, 2.4 * len(panels) + 0.4), sharex=True, squeeze=False
    )
    for axes, (key, title) in zip(all_axes[:, 0], panels, strict=True):
        for name, curve in report.training.items():
            points = [
                (step, value)
                for step, value in zip(curve["step"], curve.get(key) or [], strict=False)
                if value is not None
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colours[name], linewidth=1.8,
                    label=labels.get(name, name), marker="o" if len(points) < 30 else None,
                    markersize=4,
                )  # fmt: skip
        axes.set_title(title)
        axes.grid(axis="y")
    figure.get_layout_engine().set(hspace=0.1)
    all_axes[-1, 0].set_xlabel("optimizer step")
    legend_below(figure, all_axes[0, 0])
    return figure
