"""Plots of time: decoding speed, speedup, latencies, and all of them against the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.records.speeds import THROUGHPUT, speed_of
from bench.report.plots.style import (
    INK,
    MARKERS,
    WIDTH,
    Arms,
    Json,
    axes_of,
    bars,
    legend_below,
    measured,
    short,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LATENCIES = {
    "ttft_ms": "Time to first token (TTFT)",
    "ttfa_ms": "Time to the first token of the answer, behind reasoning (TTFA)",
    "tpot_ms": "Time per output token (TPOT)",
    "itl_ms": "Time between pieces (ITL)",
    "e2e_ms": "Whole request, end to end",
}


def rates(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Bars of tokens per second, of the kind that the verdicts are about."""
    speed = speed_of(arms[0])
    figure, axes = bars(arms, colours, speed.rate, "{:,.1f}")
    axes.set_title(f"{speed.label}: tokens per second")
    return figure


def speedups(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Bars of their speedup, with a line at 1: no speculation."""
    speed = speed_of(arms[0])
    figure, axes = bars(arms, colours, speed.speedup, "{:.2f}×")
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
    axes.set_title(f"{speed.speedup_label} over no speculation")
    axes.set_xlabel("dashed: no speculation")
    return figure


def latency(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """A panel per latency, a row per arm: median, p90 and p99 on one line."""
    from matplotlib import pyplot

    kinds = latency_kinds(arms)
    figure, all_axes = pyplot.subplots(
        len(kinds), 1, figsize=(WIDTH, 0.6 + len(kinds) * (0.7 + 0.24 * len(arms))), squeeze=False
    )
    for axes, kind in zip(all_axes[:, 0], kinds, strict=True):
        for row, arm in enumerate(arms):
            found = arm["latency"].get(kind)
            if not found:
                continue
            points = [found["p50"], found["p90"], found["p99"]]
            axes.plot(points, [row] * 3, color=colours[arm["name"]], linewidth=2, zorder=2)
            for value, marker, size in zip(points, "o|D", (46, 90, 26), strict=True):
                axes.scatter(value, row, s=size, marker=marker, color=colours[arm["name"]],
                             linewidths=2, zorder=3)  # fmt: skip
        axes.set_title(f"{LATENCIES[kind]}, ms", fontsize=11.5, pad=6)
        axes.set_yticks(range(len(arms)), [short(arm["label"], 20) for arm in arms], fontsize=10)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
    figure.supxlabel("dot: median, bar: p90, diamond: p99", fontsize=10)
    return figure


def latency_kinds(arms: Arms) -> list[str]:
    """The latencies that any arm measured."""
    return [kind for kind in LATENCIES if any((arm.get("latency") or {}).get(kind) for arm in arms)]


def load_axis(load: Sequence[Json]) -> str:
    """What the load was set by: `concurrency` or `request_rate`."""
    return "concurrency" if "concurrency" in load[0] else "request_rate"


def load_tick(step: Json) -> str:
    """A load on its axis: the number of requests, or of those a second."""
    value = step[load_axis([step])]
    return "all at once" if value == "inf" else f"{value:g}"


def _place(step: Json, load: Sequence[Json]) -> float:
    """Where a load stands on the axis; all requests at once beyond the fastest rate."""
    values = [other[load_axis(load)] for other in load]
    value = step[load_axis(load)]
    return float(value if value != "inf" else 2 * max((v for v in values if v != "inf"), default=1))


def _along(load: Sequence[Json], name: str) -> list[tuple[float, Json]]:
    """An arm at each load that it was measured at, with the load's place."""
    return [(_place(s, load), arm) for s in load for arm in s["arms"] if arm["name"] == name]


def load_speed(load: Sequence[Json], colours: Mapping[str, str]) -> Figure:
    """Tokens per second of all requests together, against the load."""
    figure, axes = axes_of()
    for name, label, marker in _load_arms(load):
        points = [
            (x, arm[THROUGHPUT.rate]["value"])
            for x, arm in _along(load, name)
            if measured(arm.get(THROUGHPUT.rate))
        ]
        _curve(axes, points, colours[name], marker, label)
    axes.set_title("Tokens per second, all requests together")
    _finish_load(figure, axes, load)
    return figure


def load_latency(load: Sequence[Json], colours: Mapping[str, str], kind: str) -> Figure:
    """A latency against the load: the median, and p99 dashed."""
    figure, axes = axes_of()
    for name, label, marker in _load_arms(load):
        found = [(x, (arm.get("latency") or {}).get(kind)) for x, arm in _along(load, name)]
        for share, style, text in (("p50", "-", label), ("p99", (0, (2, 2)), None)):
            points = [(x, spread[share]) for x, spread in found if spread]
            _curve(axes, points, colours[name], marker, text, style)
    axes.set_title(f"{LATENCIES[kind]}, ms")
    _finish_load(figure, axes, load, note="dashed: p99")
    return figure


def _load_arms(load: Sequence[Json]) -> list[tuple[str, str, str]]:
    found = {arm["name"]: arm["label"] for step in load for arm in step["arms"]}
    markers = MARKERS * len(found)
    return [(name, label, marker) for (name, label), marker in zip(found.items(), markers)]  # noqa: B905


def _curve(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    colour: str,
    marker: str,
    label: str | None,
    style: Any = "-",
) -> None:
    if points:
        axes.plot(
            *zip(*points, strict=True), color=colour, marker=marker, markersize=6, linewidth=2,
            linestyle=style, label=label,
        )  # fmt: skip


def _finish_load(figure: Figure, axes: Axes, load: Sequence[Json], note: str = "") -> None:
    values = [_place(step, load) for step in load]
    name = {"concurrency": "requests at once", "request_rate": "requests per second"}
    text = name[load_axis(load)]
    axes.set_xlabel(f"{text} ({note})" if note else text)
    if min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [load_tick(step) for step in load])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    legend_below(figure, axes)
