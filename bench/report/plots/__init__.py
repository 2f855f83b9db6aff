"""The plots of a report, from its parts: acceptance, speed, load and training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bench.report.plots import acceptance, speed
from bench.report.plots.style import Plot, colours_of, measured
from bench.report.plots.training import training

if TYPE_CHECKING:
    from bench.report.schema import Report


WITH_INTERVALS = ", with 95% intervals"


def report_plots(report: Report) -> Iterator[Plot]:
    """The plots of a report; one without data is left out."""
    yield from _of_acceptance(report)
    yield from _of_speed(report)
    if report.load:
        yield from _of_load(report)
    if report.training:
        yield "training", "Loss and held-out acceptance over training", lambda: training(report)


def _of_acceptance(report: Report) -> Iterator[Plot]:
    colours = colours_of(report.arms)
    drafted = [arm for arm in report.arms if measured(arm["acceptance_length"])]
    if drafted:
        yield (
            "acceptance_length",
            f"Tokens per target step of each draft{WITH_INTERVALS}",
            lambda: acceptance.acceptance_length(drafted, colours),
        )
        yield (
            "per_position",
            f"Share of drafts accepted up to each position{WITH_INTERVALS}",
            lambda: acceptance.per_position(drafted, colours),
        )
        yield (
            "conditional",
            f"Share accepted at each position where the one before was{WITH_INTERVALS}",
            lambda: acceptance.conditional(drafted, colours),
        )
    stepped = [arm for arm in drafted if acceptance.has_steps(arm)]
    if stepped:
        yield (
            "accepted_per_step",
            "Share of steps by the number of drafted tokens they kept",
            lambda: acceptance.accepted_per_step(stepped, colours),
        )
    spread = [arm for arm in drafted if acceptance.has_requests(arm)]
    if spread:
        yield (
            "per_request",
            "Histogram of acceptance length over the prompts",
            lambda: acceptance.per_request(spread, colours),
        )
    sorted_ = [arm for arm in drafted if arm.get("categories")]
    if sorted_:
        yield (
            "categories",
            f"Acceptance length of each draft by category{WITH_INTERVALS}",
            lambda: acceptance.by_category(sorted_, colours),
        )


def _of_speed(report: Report) -> Iterator[Plot]:
    colours = colours_of(report.arms)
    timed = [arm for arm in report.arms if measured(arm["tokens_per_second"])]
    if timed:
        yield (
            "tokens_per_second",
            f"Tokens per second of each arm{WITH_INTERVALS}",
            lambda: speed.tokens_per_second(timed, colours),
        )
    fast = [arm for arm in report.arms if measured(arm["speedup"]) and arm["provenance"]["method"]]
    if fast:
        yield (
            "speedup",
            f"Speedup over no speculation{WITH_INTERVALS}",
            lambda: speed.speedup(fast, colours),
        )
    waiting = [arm for arm in report.arms if arm.get("latency")]
    if speed.latency_kinds(waiting):
        yield (
            "latency",
            "Latencies of each arm at the median, p90 and p99",
            lambda: speed.latency(waiting, colours),
        )


def _of_load(report: Report) -> Iterator[Plot]:
    load = report.load or []
    everyone = [arm for step in load for arm in step["arms"]]
    names = {arm["name"]: arm for arm in [*report.arms, *everyone]}
    colours = colours_of(list(names.values()))
    yield (
        "load_tokens_per_second",
        "Tokens per second of all requests together, against the load",
        lambda: speed.load_speed(load, colours),
    )
    for kind in speed.latency_kinds(everyone):
        yield (
            f"load_{kind.removesuffix('_ms')}",
            f"{speed.LATENCIES[kind]} against the load, median and p99",
            lambda kind=kind: speed.load_latency(load, colours, kind),  # type: ignore[misc]
        )
