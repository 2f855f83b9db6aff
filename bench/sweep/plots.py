"""Plots of a sweep: acceptance length and speedup by k, tokens per second by concurrency."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.records.speeds import REQUEST
from bench.report.plots.style import (
    COLOURS,
    INK,
    MARKERS,
    SPARE_COLOURS,
    Plot,
    axes_of,
    colours_of,
    legend_below,
    measured,
    values_and_errors,
)
from bench.sweep.schema import PLAIN_RATE, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Json = dict[str, Any]
LINES = (*SPARE_COLOURS[:1], COLOURS["base"], COLOURS["afa-lora"], COLOURS["lora"], COLOURS["full"])


def condition_name(finding: Json) -> str:
    """What sets a finding apart from others of the same draft, in words."""
    sampling = "greedy" if finding["temperature"] == 0 else f"temperature {finding['temperature']}"
    if finding["temperature"] > 0 and finding["draft_sample_method"]:
        sampling += f", {finding['draft_sample_method']} draft"
    return f"{sampling}, up to {finding['max_tokens']} tokens"


def conditions(findings: Sequence[Json]) -> list[list[Json]]:
    """Findings grouped by their condition."""
    groups: dict[str, list[Json]] = {}
    for finding in findings:
        groups.setdefault(condition_name(finding), []).append(finding)
    return list(groups.values())


def cells_of(sweep: Sweep, finding: Json) -> list[Json]:
    """The measured cells that a finding stands on."""
    same = ("arm", "temperature", "max_tokens", "draft_sample_method")
    return [
        cell
        for cell in sweep.cells
        if cell[REQUEST.speedup] is not None and all(cell[name] == finding[name] for name in same)
    ]


def sweep_plots(sweep: Sweep) -> Iterator[Plot]:
    """The plots of a sweep: per condition acceptance by k, speedup by k, speed by concurrency."""
    groups = conditions(sweep.findings)
    for number, group in enumerate(groups):
        end = "" if len(groups) == 1 else f"_{number + 1}"
        note = "" if len(groups) == 1 else condition_name(group[0])
        yield (
            f"acceptance_by_k{end}",
            "Acceptance length of each draft by k, with 95% intervals",
            partial(_acceptance, sweep, group, note),
        )
        for finding in group:
            stem = "".join(c if c.isalnum() or c in "-." else "_" for c in finding["arm"])
            yield (
                f"speedup_by_k_{stem}{end}",
                f"Speedup of {finding['label']} by k, a line per concurrency",
                partial(_speedup, sweep, finding, note),
            )
        if len({cell["concurrency"] for f in group for cell in cells_of(sweep, f)}) > 1:
            yield (
                f"speed_by_concurrency{end}",
                "Tokens per second of all requests together by concurrency, each draft at its "
                "best k",
                partial(_throughput, sweep, group, note),
            )


def _acceptance(sweep: Sweep, group: Sequence[Json], note: str) -> Figure:
    figure, axes = axes_of()
    colours = colours_of([{"name": finding["arm"]} for finding in group])
    for finding, marker in zip(group, MARKERS * len(group), strict=False):
        cells = cells_of(sweep, finding)
        lowest = min(cell["concurrency"] for cell in cells)
        cells = [cell for cell in cells if cell["concurrency"] == lowest]
        _line(axes, cells, "k", "acceptance_length", colours[finding["arm"]], marker,
              finding["label"])  # fmt: skip
    axes.set_title("Acceptance length by k")
    _k_axis(axes, note)
    legend_below(figure, axes)
    return figure


def _speedup(sweep: Sweep, finding: Json, note: str) -> Figure:
    figure, axes = axes_of()
    cells = cells_of(sweep, finding)
    loads = sorted({cell["concurrency"] for cell in cells})
    for load, colour, marker in zip(loads, LINES * len(loads), MARKERS * len(loads), strict=False):
        here = [cell for cell in cells if cell["concurrency"] == load]
        _line(axes, here, "k", REQUEST.speedup, colour, marker, f"{load} at once")
    axes.axhline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_title(f"Speedup by k: {finding['label']}")
    _k_axis(axes, note)
    legend_below(figure, axes)
    return figure


def _throughput(sweep: Sweep, group: Sequence[Json], note: str) -> Figure:
    figure, axes = axes_of()
    colours = colours_of([{"name": "none"}, *({"name": finding["arm"]} for finding in group)])
    plain: dict[int, float] = {}
    for finding, marker in zip(group, MARKERS[1:] * len(group), strict=False):
        best = {load["concurrency"]: load["k"] for load in finding["loads"]}
        cells = [c for c in cells_of(sweep, finding) if c["k"] == best[c["concurrency"]]]
        plain |= {c["concurrency"]: c["concurrency"] * c[PLAIN_RATE]["value"] for c in cells}
        _line(axes, cells, "concurrency", REQUEST.rate, colours[finding["arm"]], marker,
              finding["label"], by="concurrency")  # fmt: skip
    loads = sorted(plain)
    axes.plot(loads, [plain[load] for load in loads], color=colours["none"], marker=MARKERS[0],
              markersize=6, linewidth=2, label="No speculation")  # fmt: skip
    axes.set_title("Tokens per second, all requests, at the best k")
    axes.set_xlabel("requests at once" + (f" ({note})" if note else ""))
    axes.set_xticks(loads)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    legend_below(figure, axes)
    return figure


def _line(
    axes: Axes, cells: Sequence[Json], x: str, y: str, colour: str, marker: str, label: str,
    by: str | None = None,
) -> None:  # fmt: skip
    """A line with intervals; `by` names what the values are multiplied by.

    A draft that never proposed anything has no acceptance, and no point.
    """
    cells = sorted((cell for cell in cells if measured(cell[y])), key=lambda cell: cell[x])
    values, (below, above) = values_and_errors([cell[y] for cell in cells])
    times = [cell[by] if by else 1 for cell in cells]

    def scaled(numbers: Sequence[float]) -> list[float]:
        return [number * factor for number, factor in zip(numbers, times, strict=True)]

    axes.errorbar(
        [cell[x] for cell in cells], scaled(values), yerr=(scaled(below), scaled(above)),
        color=colour, marker=marker, markersize=6, linewidth=2, capsize=3, label=label,
    )  # fmt: skip


def _k_axis(axes: Axes, note: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("k: speculative tokens per step" + (f" ({note})" if note else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
