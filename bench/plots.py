"""The plots of a report, as PNG files and as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Report

# Okabe and Ito's colours: told apart with any colour vision, on light and dark ground.
COLOURS = {
    "none": "#8c8c8c",
    "ngram": "#cc79a7",
    "base": "#0072b2",
    "lora": "#e69f00",
    "afa-lora": "#009e73",
    "full": "#d55e00",
}
SPARE_COLOURS = ("#56b4e9", "#d55e00", "#cc79a7", "#b8a800", "#7b5ea7", "#5c7a29")
MARKERS = "osD^vPX*"
INK, FAINT = "#1f2328", "#c9ced6"  # the SVG's INK becomes the page's text colour
WIDTH, HEIGHT = 5.6, 3.3  # inches: small, so that text stays readable when a phone shrinks it
STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.09,
    "figure.constrained_layout.w_pad": 0.09,
    "svg.fonttype": "none",
    "svg.hashsalt": "afaspec",
}

Arms = Sequence[Mapping[str, Any]]


def figures(report: Report) -> Iterator[tuple[str, str, Figure]]:
    """Each plot as (file stem, description, figure); a plot without data is left out."""
    colours = colours_of(report.arms)
    drafted = [arm for arm in report.arms if _measured(arm["acceptance_length"])]
    if drafted:
        yield (
            "acceptance_length",
            "Tokens per target step of each draft, with 95% intervals",
            acceptance_length(drafted, colours),
        )
        yield (
            "per_position",
            "Share of drafts accepted up to each position, with 95% intervals",
            per_position(drafted, colours),
        )
    yield (
        "tokens_per_second",
        "Tokens per second of each arm, with 95% intervals",
        tokens_per_second(report.arms, colours),
    )
    fast = [arm for arm in report.arms if _measured(arm["speedup"]) and arm["provenance"]["method"]]
    if fast:
        yield (
            "speedup",
            "Speedup over no speculation, with 95% intervals",
            speedup(fast, colours),
        )
    if report.training:
        yield "training", "Training curves of the adapted drafts", training(report)


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Write each plot as PNG into `folder`, atomically."""
    paths = []
    with _style():
        for stem, _, figure in figures(report):
            path = folder / f"{stem}.png"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=200, facecolor="white")
            paths.append(path)
    return paths


def svg_plots(report: Report) -> list[tuple[str, str]]:
    """Each plot as (description, SVG element), transparent and in the page's own text colour."""
    with _style():
        return [(text, _as_svg(figure, text)) for _, text, figure in figures(report)]


def colours_of(arms: Arms) -> dict[str, str]:
    """One colour per arm name, the same in every plot."""
    spare = iter(SPARE_COLOURS * len(arms))
    return {arm["name"]: COLOURS.get(arm["name"]) or next(spare) for arm in arms}


def acceptance_length(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Bars of tokens per step; the offline figure, where there is one, as a hollow diamond."""
    figure, axes = _bars(arms, colours, "acceptance_length", "{:.2f}")
    axes.set_title("Acceptance length: tokens per target step")
    offline = [
        (row, arm["offline_acceptance_length"]["value"])
        for row, arm in enumerate(arms)
        if arm.get("offline_acceptance_length")
    ]
    if offline:
        rows, values = zip(*offline, strict=True)
        axes.scatter(
            values, rows, s=42, marker="D", facecolor="white", edgecolor=INK, zorder=4,
            label="offline, from captured features",
        )  # fmt: skip
        figure.legend(loc="outside lower right", fontsize=9.5)
    return figure


def per_position(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Acceptance at each draft position, a line per arm."""
    figure, axes = _axes()
    for arm, marker in zip(arms, MARKERS * len(arms), strict=False):
        values, errors = _values_and_errors(arm["per_position"])
        positions = range(1, len(values) + 1)
        axes.errorbar(
            positions, values, yerr=errors, color=colours[arm["name"]], marker=marker,
            markersize=6.5, linewidth=2, capsize=3, label=arm["label"],
        )  # fmt: skip
    axes.set_title("Acceptance by draft position")
    axes.set_xlabel("position in the draft")
    axes.set_xticks(list(positions))
    axes.set_xlim(0.75, len(values) + 0.25)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=min(len(arms), 4), fontsize=10)
    return figure


def tokens_per_second(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Bars of decoding speed."""
    figure, axes = _bars(arms, colours, "tokens_per_second", "{:,.1f}")
    axes.set_title("Decoding speed: tokens per second")
    return figure


def speedup(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Bars of speedup, with a line at 1: no speculation."""
    figure, axes = _bars(arms, colours, "speedup", "{:.2f}×")
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    axes.set_title("Speedup over no speculation")
    axes.set_xlabel("dashed: no speculation")
    return figure


def training(report: Report) -> Figure:
    """Curves by arm: `{"step": [...], "loss": [...], "acceptance_length": [...]}`, two panels.

    Entries of `loss` and `acceptance_length` may be None where a step measured only the other.
    """
    from matplotlib import pyplot

    colours = colours_of([{"name": name} for name in report.training])
    labels = {arm["name"]: arm["label"] for arm in report.arms}
    panels = [
        (key, title)
        for key, title in (
            ("loss", "Training loss"),
            ("acceptance_length", "Held-out acceptance length"),
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
    handles, texts = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=4, fontsize=10)
    return figure


def _measured(figure: Mapping[str, float | None] | None) -> bool:
    return figure is not None and figure["value"] is not None


def _bars(arms: Arms, colours: Mapping[str, str], key: str, form: str) -> tuple[Figure, Axes]:
    """Horizontal bars with intervals, the value written beside each, the first arm on top."""
    figure, axes = _axes(height=0.9 + 0.52 * max(len(arms), 2))
    values, errors = _values_and_errors([arm[key] for arm in arms])
    rows = range(len(arms))
    axes.barh(rows, values, color=[colours[arm["name"]] for arm in arms], height=0.62)
    axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.3, capsize=3.5)
    widest = max(value + high for value, high in zip(values, errors[1], strict=True))
    for row, value, high in zip(rows, values, errors[1], strict=True):
        axes.text(
            value + high + 0.025 * widest, row, form.format(value), va="center", weight="bold"
        )
    axes.set_yticks(list(rows), [arm["label"] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.17 * widest)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    return figure, axes


def _axes(height: float = HEIGHT) -> tuple[Figure, Axes]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(WIDTH, height))


def _values_and_errors(
    rows: Sequence[Mapping[str, float]],
) -> tuple[list[float], tuple[list[float], list[float]]]:
    values = [row["value"] for row in rows]
    below = [max(row["value"] - row["low"], 0.0) for row in rows]
    above = [max(row["high"] - row["value"], 0.0) for row in rows]
    return values, (below, above)


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        try:
            yield
        finally:
            pyplot.close("all")


def _as_svg(figure: Figure, description: str) -> str:
    from html import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
