"""How every plot looks, and how it becomes an SVG element that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
LEGEND_WIDTH = 80  # characters that stand in a row of a legend
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

Json = Mapping[str, Any]
Arms = Sequence[Json]
Errors = tuple[list[float], list[float]]
Plot = tuple[str, str, Callable[[], "Figure"]]  # file stem, description, how to draw it


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib without a screen and in this style; all figures are closed at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        try:
            yield
        finally:
            pyplot.close("all")


def colours_of(arms: Arms) -> dict[str, str]:
    """One colour per arm name, the same in every plot; no two alike while they last."""
    taken = {COLOURS.get(arm["name"]) for arm in arms}
    spare = cycle(colour for colour in SPARE_COLOURS if colour not in taken)
    return {arm["name"]: COLOURS.get(arm["name"]) or next(spare) for arm in arms}


def measured(figure: Json | None) -> bool:
    """Whether a report's figure holds a value."""
    return figure is not None and figure["value"] is not None


def axes_of(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, `height` in inches."""
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(WIDTH, height))


def values_and_errors(rows: Sequence[Json]) -> tuple[list[float], Errors]:
    """Values, and how far their intervals reach below and above; 0 where there is none."""
    values = [row["value"] for row in rows]
    below = [0.0 if row["low"] is None else max(row["value"] - row["low"], 0.0) for row in rows]
    above = [0.0 if row["high"] is None else max(row["high"] - row["value"], 0.0) for row in rows]
    return values, (below, above)


def bars(arms: Arms, colours: Mapping[str, str], key: str, form: str) -> tuple[Figure, Axes]:
    """Horizontal bars with intervals, the value written beside each, the first arm on top."""
    figure, axes = axes_of(height=0.9 + 0.52 * max(len(arms), 2))
    values, errors = values_and_errors([arm[key] for arm in arms])
    rows = range(len(arms))
    axes.barh(rows, values, color=[colours[arm["name"]] for arm in arms], height=0.62)
    axes.errorbar(values, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=1.3, capsize=3.5)
    widest = max(value + high for value, high in zip(values, errors[1], strict=True))
    for row, value, high in zip(rows, values, errors[1], strict=True):
        axes.text(
            value + high + 0.025 * widest, row, form.format(value), va="center", weight="bold"
        )
    axes.set_yticks(list(rows), [short(arm["label"], 20) for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.17 * widest)
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    return figure, axes


@dataclass(frozen=True)
class Series:
    """A colour's figures in a plot of `dots`: one per row, None where it has none."""

    label: str
    colour: str
    marker: str
    figures: Sequence[Json | None]


def dots(rows: Sequence[str], series: Sequence[Series]) -> tuple[Figure, Axes]:
    """Figures with their intervals in rows, the first on top, the series slightly apart."""
    figure, axes = axes_of(height=1.3 + 0.42 * max(len(rows), 2))
    for index, one in enumerate(series):
        offset = (index - (len(series) - 1) / 2) * min(0.6 / len(series), 0.16)
        found = [(row + offset, at) for row, at in enumerate(one.figures) if at and measured(at)]
        if found:
            values, errors = values_and_errors([at for _, at in found])
            axes.errorbar(
                values, [row for row, _ in found], xerr=errors, fmt=one.marker, markersize=6.5,
                color=one.colour, elinewidth=1.6, label=one.label,
            )  # fmt: skip
    axes.set_yticks(range(len(rows)), [short(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="both")
    axes.spines["bottom"].set_visible(False)
    legend_below(figure, axes)
    return figure, axes


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend under the figure, from the labels of `axes`."""
    handles, found = axes.get_legend_handles_labels()
    labels = [short(label) for label in found]
    widest = max(map(len, labels), default=1)
    fitting = max(1, LEGEND_WIDTH // (widest + 6))  # its line and the gaps take some characters
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), columns, fitting),
        fontsize=10,
    )  # fmt: skip


def short(label: str, longest: int = 28) -> str:
    """A name that fits beside or below a plot: the middle of a long one is left out."""
    half = longest // 2
    return label if len(label) <= longest else f"{label[:half]}…{label[1 - half :]}"


def write_pngs(plots: Iterable[Plot], folder: Path) -> None:
    """Write every plot as a PNG on white into `folder`, each atomically."""
    with styled():
        for stem, _, draw in plots:
            with atomic_file(folder / f"{stem}.png") as temporary:
                draw().savefig(temporary, format="png", dpi=200, facecolor="white")


def as_svgs(plots: Iterable[Plot]) -> list[str]:
    """Every plot as an SVG element in the page's own text colour."""
    with styled():
        return [_as_svg(draw(), text, stem) for stem, text, draw in plots]


def _as_svg(figure: Figure, description: str, name: str) -> str:
    """The figure as an SVG element: titled, transparent, in the page's own text colour.

    `name` goes before the ids inside, which must differ between the plots of one page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    opening = f'<svg role="img" aria-labelledby="{name}-title" '
    svg = svg.replace("<svg ", opening, 1)
    title = f'<title id="{name}-title">{escape(description)}</title>'
    svg = svg.replace(">", f">{title}", 1)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
