"""report.html from a report: its values, which templates/report.html lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.speeds import REQUEST, THROUGHPUT, speed_of
from bench.report.console import warnings
from bench.report.html import PageTable, render
from bench.report.plots import report_plots
from bench.report.plots.speed import LATENCIES, latency_kinds, load_axis, load_tick
from bench.report.plots.style import as_svgs, colours_of
from bench.report.schema import Report, load_words
from bench.report.words import (
    MARKS,
    NOTHING,
    TableCell,
    also,
    category_rows,
    figure_cell,
    headline,
    is_plain,
    settings_line,
    table_columns,
    table_rows,
    token_shown,
)

Json = Mapping[str, Any]
SERVED = (THROUGHPUT, REQUEST)  # the speeds that a server has
LOAD_AXES = {"concurrency": "Requests at once", "request_rate": "Requests/s"}
DIFFERENCES = ("Arm", "Prompt", "Position", "Token", "Instead", "Gap (nats)", "Near-tie")
SHOWN_DIFFERENCES = 50
TESTED = ("p_value", "control_p_value", "power", "detects", "samples", "tokens", "positions")


def render_page(report: Report) -> str:
    """The page: what was found, a table, plots, details, and how it was measured."""
    drawn = list(report_plots(report))
    plots = dict(zip([stem for stem, *_ in drawn], as_svgs(drawn), strict=True))

    def grid(*stems: str) -> list[str]:
        return [plots[stem] for stem in stems if stem in plots]

    answered = [arm for arm in report.arms if arm.get("latency")]
    parted = _differences(report.arms)
    tested = [arm for arm in report.arms if arm.get("distribution")]
    speed = speed_of(report.arms[0])
    return render(
        "report.html",
        headline=headline(report.arms),
        also=also(report.arms),
        example=report.example,
        settings=settings_line(report.provenance),
        verdicts=_verdicts(report),
        warnings=warnings(report),
        arms=PageTable(
            table_columns(report.arms),
            table_rows(report.arms),
            _swatches(report.arms, report.arms),
        ),
        first_plots=grid("acceptance_length", speed.speedup),
        categories=_categories(report.arms),
        category_plots=grid("categories"),
        acceptance_plots=grid("per_position", "conditional", "accepted_per_step", "per_request"),
        latencies=_latencies(answered, report.arms),
        latency_note=_latency_note(answered),
        speed_plots=grid(speed.rate, "latency"),
        load=_load(report),
        load_plots=grid(*(stem for stem in plots if stem.startswith("load_"))),
        training_plots=grid("training"),
        differences=PageTable(DIFFERENCES, parted[:SHOWN_DIFFERENCES]) if parted else None,
        more_differences=len(parted) - SHOWN_DIFFERENCES,
        noise=_noise_words(report.noise),
        distribution_words=[f"{arm['label']}: {arm['distribution']['words']}" for arm in tested],
        distribution=_distribution(tested),
        provenance=report.provenance,
        own_provenance=[(arm["label"], _own(arm, report.provenance)) for arm in report.arms],
    )


def _verdicts(report: Report) -> list[tuple[str, str]]:
    """What can be said of one arm against another: a sentence each, the clear ones first.

    Of several loads each has its own sentences, which name it.
    """
    said = [(str(found["verdict"]), str(found["words"])) for found in report.comparisons]
    if report.load:
        said = [
            (str(found["verdict"]), f"{load_words(step)}: {found['words']}")
            for step in report.load
            for found in step.get("comparisons") or []  # older reports have those of the first
        ] or said
    return sorted(said, key=lambda one: one[0] not in MARKS)


def _swatches(rows: Sequence[Json], arms: Sequence[Json]) -> list[str]:
    """The colours that the rows' arms have in plots of `arms`."""
    colours = colours_of(arms)
    return [colours[arm["name"]] for arm in rows]


def _categories(arms: Sequence[Json]) -> list[PageTable]:
    """Acceptance length and speedup, a row per category and a column per arm."""
    speed, tables = speed_of(arms[0]), []
    for key, caption, form in (
        ("acceptance_length", "Acceptance length", "{:.2f}"),
        (speed.speedup, f"{speed.speedup_label} over no speculation", "{:.2f}×"),
    ):
        columns, rows = category_rows(arms, key, form)
        if len(columns) > 2:
            tables.append(PageTable(columns, rows, caption=caption))
    return tables


def _latencies(answered: Sequence[Json], arms: Sequence[Json]) -> PageTable | None:
    """A row per arm, a column per latency: the median, with p90 and p99."""
    kinds = latency_kinds(answered)
    if not kinds:
        return None
    rows = [
        [TableCell(arm["label"]), *(_latency_cell(arm["latency"].get(kind)) for kind in kinds)]
        for arm in answered
    ]
    columns = ["Arm", *(f"{_short(kind)}, ms" for kind in kinds)]
    return PageTable(columns, rows, _swatches(answered, arms))


def _latency_note(answered: Sequence[Json]) -> str:
    """What the latencies are, and how many requests have none."""
    kinds = [
        f"{_short(kind)}: {LATENCIES[kind].partition(' (')[0].lower()}."
        for kind in latency_kinds(answered)
    ]
    note = " ".join(["Medians over all requests, with p90 and p99 below.", *kinds])
    if "itl_ms" in latency_kinds(answered):
        note += " A piece may have several tokens; those that were read at once are 0 ms apart."
    failed = sum(arm["latency"].get("failed") or 0 for arm in answered)
    return note + (f" {failed} requests failed and are not counted." if failed else "")


def _load(report: Report) -> PageTable | None:
    """A row per load and arm: speed of all requests together, acceptance and latencies."""
    if not report.load:
        return None
    everyone = [arm for step in report.load for arm in step["arms"]]
    kinds = latency_kinds(everyone)
    speed = speed_of(report.arms[0])
    columns = ["Arm", LOAD_AXES[load_axis(report.load)], *(s.rate_label for s in SERVED)]
    columns += [
        speed.speedup_label,
        "Acceptance length",
        *(f"{_short(kind)}, ms" for kind in kinds),
    ]
    rows = [
        [
            TableCell(arm["label"]),
            TableCell(load_tick(step)),
            *(figure_cell(arm.get(served.rate), "{:,.1f}") for served in SERVED),
            figure_cell(None if is_plain(arm) else arm.get(speed.speedup), "{:.2f}×"),
            figure_cell(arm.get("acceptance_length"), "{:.2f}"),
            *(_latency_cell((arm.get("latency") or {}).get(kind)) for kind in kinds),
        ]
        for step in report.load
        for arm in step["arms"]
    ]
    arms = {arm["name"]: arm for arm in [*report.arms, *everyone]}
    return PageTable(columns, rows, _swatches(everyone, list(arms.values())))


def _differences(arms: Sequence[Json]) -> list[list[str]]:
    """Where outputs leave the one without speculation, and how close a call it was; what several
    arms said alike is one row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for arm in arms:
        for found in (arm["lossless"] or {}).get("differences", []):
            row = (
                str(found["prompt"]),
                str(found["position"]),
                token_shown(found, "none"),
                token_shown(found, "arm"),
                _gap(found),
                {True: "yes", False: "no", None: "not examined"}[found["near_tie"]],
            )
            rows.setdefault(row, []).append(arm["label"])
    return [[", ".join(labels), *row] for row, labels in rows.items()]


def _noise_words(noise: Json | None) -> str:
    """How far rounding alone moves a gap, where that was measured."""
    if not noise:
        return ""
    return (
        "Decoding token by token and one prefill over the same text disagree about such gaps "
        f"by up to {noise['max']:.3g} nats (median {noise['median']:.2g}, 99th percentile "
        f"{noise['p99']:.2g}, over {noise['positions']:,} positions): a gap within "
        f"{noise.get('limit', noise['max']):.3g} is a near-tie, which rounding alone can turn."
    )


def _distribution(tested: Sequence[Json]) -> PageTable | None:
    """The distribution test of every arm: what it found, and what it could have found."""
    if not tested:
        return None
    columns = ["Arm", *(key.replace("_", " ") for key in TESTED)]
    rows = [
        [arm["label"], *(_number(arm["distribution"].get(key)) for key in TESTED)] for arm in tested
    ]
    return PageTable(columns, rows)


def _own(arm: Json, common: Json) -> dict[str, Any]:
    """The settings that not all arms share."""
    return {
        key: value
        for key, value in arm["provenance"].items()
        if key not in common or common[key] != value
    }


def _short(kind: str) -> str:
    return kind.removesuffix("_ms").upper()


def _latency_cell(found: Mapping[str, float] | None) -> TableCell:
    if not found:
        return TableCell(NOTHING)
    return TableCell(f"{found['p50']:,.1f}", f"{found['p90']:,.1f}, {found['p99']:,.1f}")


def _gap(found: Json) -> str:
    gap = found["gap"] if found["gap"] is not None else found["gap_prefill"]
    return "not in the top 20" if gap is None else f"{gap:.4f}"


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
