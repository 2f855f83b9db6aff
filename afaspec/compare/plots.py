"""The plots of a study, one set per domain, drawn from study.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from afaspec.compare.figures import REFERENCE_RANK
from afaspec.compare.plan import Json
from bench.records.arms import LABELS
from bench.report.plots.style import (
    COLOURS,
    INK,
    MARKERS,
    Plot,
    Series,
    axes_of,
    bars,
    colours_of,
    dots,
    legend_below,
    values_and_errors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


AXES = {"rank": "LoRA rank", "steps": "optimizer steps", "samples": "training sequences"}
SIDESTEP = 0.013  # of the axis, between arms at one place: no interval hides another


def study_plots(study: Json, domain: str) -> Iterator[Plot]:
    """Acceptance length by arm, by rank, by steps and by samples; those with something to show."""
    results = study["domains"][domain]
    colours = colours_of([{"name": name} for name in ("base", *study["settings"]["arms"])])
    if results["arms"]:
        said = f"{domain}: acceptance length of each arm, with 95% intervals"
        yield f"{domain}_arms", said, lambda: by_arm(results, colours, domain)
    if results.get("general"):
        said = f"{domain}: acceptance length on its own and on general prompts, with 95% intervals"
        yield f"{domain}_general", said, lambda: beside_general(results, domain)
    everything = results["sequences"]["train"]  # what samples: null stands for
    arms = [{**arm, "samples": arm["samples"] or everything} for arm in results["arms"]]
    for axis, title in AXES.items():
        chosen = along(arms, axis)
        if len({arm[axis] for arm in chosen if arm[axis] is not None}) > 1:
            said = f"{domain}: acceptance length by {title}, with 95% intervals"
            yield f"{domain}_{axis}", said, partial(by_axis, chosen, axis, results, colours)


def overall_plots(study: Json) -> Iterator[Plot]:
    """What is drawn of all domains together: every comparison, with its interval."""
    if any(results["comparisons"] for results in study["domains"].values()):
        said = "differences in acceptance length between arms, with 95% intervals"
        yield "differences", said, lambda: differences(study)


def all_plots(study: Json) -> Iterator[Plot]:
    """Those of all domains together, then each domain's."""
    yield from overall_plots(study)
    for domain in study["domains"]:
        yield from study_plots(study, domain)


def beside_general(results: Json, domain: str) -> Figure:
    """A row per arm, a mark for its domain and one for the general prompts."""
    arms = [results["base"] | {"general": results["general"]}, *results["arms"]]
    pairs = {
        domain: [arm["acceptance_length"] for arm in arms],
        "general": [(arm["general"] or {}).get("acceptance_length") for arm in arms],
    }
    series = [
        Series(name, colour, marker, figures)
        for (name, figures), colour, marker in zip(
            pairs.items(), [*COLOURS.values()][2:], MARKERS, strict=False
        )
    ]
    figure, axes = dots([LABELS["base"], *(shown(arm["label"]) for arm in arms[1:])], series)
    axes.set_title(f"{domain}: what was learned, and what was kept")
    axes.set_xlabel("acceptance length")
    return figure


def differences(study: Json) -> Figure:
    """A row per pair of arms, a mark per domain: how much longer the first one's acceptance is."""
    by_domain = {
        domain: {(c["arm"], c["against"]): c["difference"] for c in results["comparisons"]}
        for domain, results in study["domains"].items()
    }
    pairs = list(dict.fromkeys(pair for found in by_domain.values() for pair in found))
    names = [" − ".join(map(shown, pair)) for pair in pairs]
    series = [
        Series(domain, colour, marker, [found.get(pair) for pair in pairs])
        for (domain, found), colour, marker in zip(
            by_domain.items(), [*COLOURS.values()][2:] * 9, MARKERS * 9, strict=False
        )
    ]
    figure, axes = dots(names, series)
    axes.axvline(0, color=INK, linewidth=1)
    title = "Differences in acceptance length"  # the axes are too narrow for it
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
    return figure


def by_arm(results: Json, colours: Mapping[str, str], domain: str) -> Figure:
    """Bars with intervals; each seed is a dot."""
    found = [{"arm": "base", **results["base"]}, *results["arms"]]
    arms = [{**arm, "name": arm["arm"], "label": shown(arm["label"])} for arm in found]
    figure, axes = bars(arms, colours, "acceptance_length", "{:.2f}")
    for row, arm in enumerate(arms):
        if len(arm["by_seed"]) > 1:
            places = [row] * len(arm["by_seed"])
            axes.scatter(arm["by_seed"], places, s=14, facecolor="white", edgecolor=INK, zorder=4)
    axes.set_title(f"{domain}: tokens per target step")
    axes.set_xlabel("dots: single seeds")
    return figure


def along(arms: list[Json], axis: str) -> list[Json]:
    """The variants that vary along `axis` alone: at the largest budget, each near rank 8.

    Of the arms those with several values, and those that have none at all.
    """
    kept = arms
    if axis != "rank":
        near = {
            arm["arm"]: min(
                (one["rank"] for one in arms if one["arm"] == arm["arm"] and one["rank"]),
                key=lambda rank: abs(rank - REFERENCE_RANK),
                default=None,
            )
            for arm in arms
        }
        kept = [arm for arm in kept if arm["rank"] == near[arm["arm"]]]
    for budget in {"steps", "samples"} - {axis}:
        most = max((arm[budget] for arm in arms), default=None)
        kept = [arm for arm in kept if arm[budget] == most]
    places = {arm["arm"]: {a[axis] for a in kept if a["arm"] == arm["arm"]} for arm in kept}
    return [arm for arm in kept if len(places[arm["arm"]]) > 1 or arm[axis] is None]


def shown(label: str) -> str:
    """A variant's label, with the arm's name as a reader likes it."""
    name, space, rest = label.partition(" ")
    return LABELS.get(name, name) + space + rest


def by_axis(chosen: list[Json], axis: str, results: Json, colours: Mapping[str, str]) -> Figure:
    """A line per arm along `axis`, slightly apart; the base draft as a level line."""
    figure, axes = axes_of()
    names = list(dict.fromkeys(arm["arm"] for arm in chosen))
    places = sorted({arm[axis] for arm in chosen if arm[axis] is not None})
    for i, (marker, name) in enumerate(zip(MARKERS * 9, names, strict=False)):
        mine = [arm for arm in chosen if arm["arm"] == name]
        aside = (places[-1] / places[0]) ** (SIDESTEP * (i - (len(names) - 1) / 2))
        _line(axes, mine, axis, colours[name], marker, aside)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    base = results["base"]["acceptance_length"]["value"]
    axes.axhline(base, color=colours["base"], linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        LABELS["base"], (0.99, base), xycoords=("axes fraction", "data"), ha="right",
        xytext=(0, 3), textcoords="offset points", fontsize=9.5, color=colours["base"],
    )  # fmt: skip
    axes.set_title(f"Acceptance length by {AXES[axis]}")
    axes.set_xlabel(AXES[axis])
    axes.grid(axis="y")
    legend_below(figure, axes, columns=3)
    return figure


def _line(axes: Axes, arms: list[Json], axis: str, colour: str, marker: str, aside: float) -> None:
    """An arm along the axis, its places times `aside`; a level line where it has none."""
    label = shown(arms[0]["arm"])
    varying = sorted((arm for arm in arms if arm[axis] is not None), key=lambda arm: arm[axis])
    if not varying:
        value = arms[0]["acceptance_length"]["value"]
        axes.axhline(value, color=colour, linewidth=2, label=label)
        return
    places = [arm[axis] * aside for arm in varying]
    values, errors = values_and_errors([arm["acceptance_length"] for arm in varying])
    axes.errorbar(
        places, values, yerr=errors, color=colour, marker=marker, markersize=6.5, linewidth=2,
        capsize=3, label=label,
    )  # fmt: skip
