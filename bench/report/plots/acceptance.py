"""Plots of acceptance: how much of what was drafted the target kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.report.plots.style import (
    INK,
    MARKERS,
    Arms,
    Series,
    axes_of,
    bars,
    dots,
    legend_below,
    measured,
    values_and_errors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def acceptance_length(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Bars of tokens per step; the offline figure, where there is one, as a hollow diamond."""
    figure, axes = bars(arms, colours, "acceptance_length", "{:.2f}")
    axes.set_title("Acceptance length, tokens a step")
    offline = [
        (row, arm["offline_acceptance_length"]["value"])
        for row, arm in enumerate(arms)
        if measured(arm.get("offline_acceptance_length"))
    ]
    if offline:
        rows, values = zip(*offline, strict=True)
        axes.scatter(
            values, rows, s=42, marker="D", facecolor="white", edgecolor=INK, zorder=4,
            label="offline, from captured features",
        )  # fmt: skip
        figure.legend(loc="outside lower right", fontsize=10)
    return figure


def per_position(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Acceptance at each draft position, a line per arm."""
    return _by_position(arms, colours, "per_position", "Acceptance by draft position")


def conditional(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Acceptance at each position given that the one before was accepted."""
    return _by_position(arms, colours, "conditional", "Accepted, given that the token before was")


def accepted_per_step(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """Share of steps that accepted exactly 0, 1 ... k tokens, bars side by side."""
    figure, axes = axes_of()
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        counts = arm["accepted_lengths"]["per_step"]
        shares = [count / max(sum(counts), 1) for count in counts]
        offset = (index - (len(arms) - 1) / 2) * width
        places = [count + offset for count in range(len(counts))]
        axes.bar(places, shares, 0.9 * width, color=colours[arm["name"]], label=arm["label"])
    axes.set_title("Drafted tokens kept in a step")
    axes.set_xlabel("tokens accepted")
    axes.set_xticks(range(max(len(arm["accepted_lengths"]["per_step"]) for arm in arms)))
    _percent(axes)
    axes.grid(axis="y")
    legend_below(figure, axes)
    return figure


def per_request(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """How acceptance length is spread over the prompts: outlines of histograms, same bins."""
    figure, axes = axes_of()
    values = [_requests(arm) for arm in arms]
    low, high = min(map(min, values)), max(map(max, values))
    count = min(max(int(len(values[0]) ** 0.5), 12), 24)
    edges = [low + (high - low or 1.0) * i / count for i in range(count + 1)]
    for arm, numbers in zip(arms, values, strict=True):
        colour = colours[arm["name"]]
        weights = [1 / len(numbers)] * len(numbers)
        axes.hist(numbers, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.18)
        axes.hist(
            numbers, edges, weights=weights, histtype="step", color=colour, linewidth=1.8,
            label=arm["label"],
        )  # fmt: skip
    axes.set_title("Acceptance length over the prompts")
    axes.set_xlabel("tokens per target step of a prompt")
    axes.set_ylabel("prompts")
    _percent(axes)
    axes.grid(axis="y")
    legend_below(figure, axes)
    return figure


def by_category(arms: Arms, colours: Mapping[str, str]) -> Figure:
    """A row per category, a dot with its interval per arm."""
    names = list(arms[0]["categories"])
    series = [
        Series(
            arm["label"],
            colours[arm["name"]],
            marker,
            [arm["categories"][name]["acceptance_length"] for name in names],
        )
        for arm, marker in zip(arms, MARKERS * len(arms), strict=False)
    ]
    figure, axes = dots(names, series)
    axes.set_title("Acceptance length by category")
    axes.set_xlabel("tokens per target step")
    return figure


def has_steps(arm: Mapping[str, Any]) -> bool:
    """Whether the arm says how acceptance is spread over steps."""
    return bool(arm.get("accepted_lengths"))


def has_requests(arm: Mapping[str, Any]) -> bool:
    """Whether the arm says how acceptance is spread over at least two prompts."""
    return has_steps(arm) and len(_requests(arm)) > 1


def _requests(arm: Mapping[str, Any]) -> Sequence[float]:
    return [length for length in arm["accepted_lengths"]["per_request"] if length is not None]


def _by_position(arms: Arms, colours: Mapping[str, str], key: str, title: str) -> Figure:
    figure, axes = axes_of()
    deepest = 1
    for arm, marker in zip(arms, MARKERS * len(arms), strict=False):
        found = [(at, share) for at, share in enumerate(arm[key], start=1) if measured(share)]
        if not found:
            continue
        values, errors = values_and_errors([share for _, share in found])
        positions = [at for at, _ in found]
        deepest = max(deepest, len(arm[key]))
        axes.errorbar(
            positions, values, yerr=errors, color=colours[arm["name"]], marker=marker,
            markersize=6.5, linewidth=2, capsize=3, label=arm["label"],
        )  # fmt: skip
    axes.set_xlabel("position in the draft")
    axes.set_xticks(range(1, deepest + 1))
    axes.set_xlim(0.75, deepest + 0.25)
    axes.set_ylim(0, 1)
    _percent(axes)
    axes.grid(axis="y")
    axes.set_title(title)
    legend_below(figure, axes)
    return figure


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
