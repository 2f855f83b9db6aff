"""The plots of a report, from its parts: acceptance, speed, load and training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from bench.records.speeds import MEASURES, THROUGHPUT, speed_of
from bench.report.plots import acceptance, speed
from bench.report.plots.style import Plot, colours_of, measured
from bench.report.plots.training import training
from bench.report.schema import Report

DESCRIPTIONS = {
    "acceptance_length": "Tokens per target step of each draft, with 95% intervals",
    "per_position": "Share of drafts accepted up to each position, with 95% intervals",
    "conditional": "Share accepted at each position where the one before was, with 95% intervals",
    "accepted_per_step": "Share of steps by the number of drafted tokens they kept",
    "per_request": "Histogram of acceptance length over the prompts",
    "categories": "Acceptance length of each draft by category, with 95% intervals",
    **{key: f"{name} of each arm, with 95% intervals" for key, name in MEASURES.items()},
    "latency": "Latencies of each arm at the median, p90 and p99",
}


def report_plots(report: Report) -> Iterator[Plot]:
    """The plots of a report; one without data is left out."""
    colours = colours_of(report.arms)
    drafted = [arm for arm in report.arms if measured(arm["acceptance_length"])]
    stepped = [arm for arm in drafted if acceptance.has_steps(arm)]
    spread = [arm for arm in drafted if acceptance.has_requests(arm)]
    pace = speed_of(report.arms[0])
    timed = [arm for arm in report.arms if measured(arm[pace.rate])]
    fast = [a for a in report.arms if measured(a[pace.speedup]) and a["provenance"]["method"]]
    waiting = [arm for arm in report.arms if arm.get("latency")]
    shown = {
        "acceptance_length": (acceptance.acceptance_length, drafted),
        "per_position": (acceptance.per_position, drafted),
        "conditional": (acceptance.conditional, drafted),
        "accepted_per_step": (acceptance.accepted_per_step, stepped),
        "per_request": (acceptance.per_request, spread),
        "categories": (acceptance.by_category, [arm for arm in drafted if arm.get("categories")]),
        pace.rate: (speed.rates, timed),
        pace.speedup: (speed.speedups, fast),
        "latency": (speed.latency, waiting if speed.latency_kinds(waiting) else []),
    }
    for stem, (draw, arms) in shown.items():
        if arms:
            yield stem, DESCRIPTIONS[stem], partial(draw, arms, colours)
    if report.load:
        yield from _of_load(report)
    if report.training:
        yield "training", "Loss and held-out acceptance over training", partial(training, report)


def _of_load(report: Report) -> Iterator[Plot]:
    load = report.load or []
    everyone = [arm for step in load for arm in step["arms"]]
    names = {arm["name"]: arm for arm in [*report.arms, *everyone]}
    colours = colours_of(list(names.values()))
    yield (
        f"load_{THROUGHPUT.rate}",
        "Tokens per second of all requests together, against the load",
        partial(speed.load_speed, load, colours),
    )
    for kind in speed.latency_kinds(everyone):
        yield (
            f"load_{kind.removesuffix('_ms')}",
            f"{speed.LATENCIES[kind]} against the load, median and p99",
            partial(speed.load_latency, load, colours, kind),
        )
