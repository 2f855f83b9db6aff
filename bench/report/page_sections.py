"""The sections of a report's page: each a function from the report to HTML, empty without data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from bench.report.markup import (
    MARKS,
    definitions,
    paragraph,
    plain_table,
    table,
    verdict_list,
    warning_list,
)
from bench.report.plots.speed import LATENCIES, latency_kinds, load_axis, load_words
from bench.report.plots.style import colours_of
from bench.report.words import (
    COLUMNS,
    NOTHING,
    Cell,
    category_rows,
    figure_cell,
    is_plain,
    table_rows,
)

if TYPE_CHECKING:
    from bench.report.schema import Report


SHOWN_DIFFERENCES = 50


def verdicts(report: Report) -> str:
    """What can be said of one arm against another: a sentence each, the clear ones first."""
    said = [(str(found["verdict"]), str(found["words"])) for found in report.comparisons]
    return verdict_list(sorted(said, key=lambda one: one[0] not in MARKS))


def main_table(report: Report) -> str:
    """A row per arm: acceptance, speed, and whether the output is the same."""
    colours = colours_of(report.arms)
    swatches = [colours[arm["name"]] for arm in report.arms]
    note = (
        "Ranges are 95% bootstrap intervals over prompts and rounds, paired between arms. "
        "Acceptance length counts the target's own token. Tokens per second cover the decode "
        "phase. "
        "Verdicts stand on Student-t intervals, wider than these where prompts are few."
    )
    return table(COLUMNS, table_rows(report.arms), swatches=swatches) + paragraph(note, "note")


def categories(report: Report) -> str:
    """Acceptance length and speedup, a row per category and a column per arm."""
    tables = []
    for key, caption, form in (
        ("acceptance_length", "Acceptance length", "{:.2f}"),
        ("speedup", "Speedup over no speculation", "{:.2f}×"),
    ):
        columns, rows = category_rows(report.arms, key, form)
        if len(columns) > 2:
            tables.append(table(columns, rows, caption=caption))
    return "\n".join(tables)


def latencies(report: Report) -> str:
    """A row per arm, a column per latency: the median, with p90 and p99."""
    arms = [arm for arm in report.arms if arm.get("latency")]
    kinds = latency_kinds(arms)
    if not kinds:
        return ""
    columns = ["Arm", *(f"{kind.removesuffix('_ms').upper()}, ms" for kind in kinds)]
    rows = [
        [Cell(arm["label"]), *(_latency_cell(arm["latency"].get(kind)) for kind in kinds)]
        for arm in arms
    ]
    failed = sum(arm["latency"].get("failed") or 0 for arm in arms)
    note = "Medians over all requests, with p90 and p99 below. " + " ".join(
        f"{kind.removesuffix('_ms').upper()}: {LATENCIES[kind].partition(' (')[0].lower()}."
        for kind in kinds
    )
    if failed:
        note += f" {failed} requests failed and are not counted."
    colours = colours_of(report.arms)
    swatches = [colours[arm["name"]] for arm in arms]
    return table(columns, rows, swatches=swatches) + paragraph(note, "note")


def load(report: Report) -> str:
    """A row per load and arm: speed of all requests together, acceptance and latencies."""
    if not report.load:
        return ""
    axis = load_axis(report.load)
    everyone = [arm for step in report.load for arm in step["arms"]]
    kinds = latency_kinds(everyone)
    name = {"concurrency": "Requests at once", "request_rate": "Requests/s"}[axis]
    columns = ["Arm", name, "Tokens/s", "Speedup", "Acceptance length"]
    columns += [f"{kind.removesuffix('_ms').upper()}, ms" for kind in kinds]
    rows = [
        [
            Cell(arm["label"]),
            Cell(load_words(step)),
            figure_cell(arm.get("tokens_per_second"), "{:,.1f}"),
            figure_cell(None if is_plain(arm) else arm.get("speedup"), "{:.2f}×"),
            figure_cell(arm.get("acceptance_length"), "{:.2f}"),
            *(_latency_cell((arm.get("latency") or {}).get(kind)) for kind in kinds),
        ]
        for step in report.load
        for arm in step["arms"]
    ]
    colours = colours_of(list({arm["name"]: arm for arm in [*report.arms, *everyone]}.values()))
    swatches = [colours[arm["name"]] for arm in everyone]
    note = "Tokens/s of all requests together. Latencies are medians, with p90 and p99 below."
    return table(columns, rows, swatches=swatches) + paragraph(note, "note")


def differences(report: Report) -> str:
    """Where an arm's output leaves the one without speculation, and how close a call it was."""
    rows = [
        (arm["label"], found)
        for arm in report.arms
        if arm["lossless"]
        for found in arm["lossless"]["differences"]
    ]
    if not rows:
        return ""
    noise = report.noise
    said = (
        "The output first parts from the output without speculation at these positions. The gap is "
        "the target's log-probability of its own token minus that of the other token."
    )
    if noise:
        said += (
            f" Decoding token by token and one prefill over the same text disagree about such gaps "
            f"by up to {noise['max']:.3g} nats (median {noise['median']:.2g}, 99th percentile "
            f"{noise['p99']:.2g}, over {noise['positions']:,} positions): a gap within that is a "
            "near-tie, which rounding alone can turn."
        )
    found_table = plain_table(
        ("Arm", "Prompt", "Position", "Token", "Instead", "Gap (nats)", "Near-tie"),
        [
            (
                label, str(found["prompt"]), str(found["position"]), token_shown(found, "none"),
                token_shown(found, "arm"), _gap(found), "yes" if found["near_tie"] else "no",
            )
            for label, found in rows[:SHOWN_DIFFERENCES]
        ],
    )  # fmt: skip
    more = len(rows) - SHOWN_DIFFERENCES
    rest = paragraph(f"{more} more are in report.json.", "note") if more > 0 else ""
    return paragraph(said) + found_table + rest


def distribution(report: Report) -> str:
    """The distribution test of every arm: what it found, and what it could have found."""
    tested = [arm for arm in report.arms if arm.get("distribution")]
    if not tested:
        return ""
    keys = ("p_value", "control_p_value", "power", "detects", "samples", "tokens", "positions")
    said = [paragraph(f"{arm['label']}: {arm['distribution']['words']}") for arm in tested]
    rows = [
        [arm["label"], *(_number(arm["distribution"].get(key)) for key in keys)] for arm in tested
    ]
    return "\n".join(said) + plain_table(["Arm", *(key.replace("_", " ") for key in keys)], rows)


def provenance(report: Report) -> str:
    """The settings that all arms share, then what is an arm's own."""
    own = "".join(
        f"<h3>{escape(arm['label'])}</h3>{definitions(_own_part(arm, report.provenance))}"
        for arm in report.arms
    )
    return definitions(report.provenance) + own


def warnings(report: Report) -> str:
    """What to know before the figures are trusted, where a run has such warnings."""
    steps = [report.arms, *(step["arms"] for step in report.load or [])]
    return warning_list(
        dict.fromkeys(text for arms in steps for arm in arms for text in arm.get("warnings") or [])
    )


def _latency_cell(found: Mapping[str, float] | None) -> Cell:
    if not found:
        return Cell(NOTHING)
    return Cell(f"{found['p50']:,.1f}", f"{found['p90']:,.1f}, {found['p99']:,.1f}")


def _gap(found: Mapping[str, Any]) -> str:
    gap = found["gap"] if found["gap"] is not None else found["gap_prefill"]
    return "not in the top 20" if gap is None else f"{gap:.4f}"


def token_shown(found: Mapping[str, Any], of: str) -> str:
    """The token as text in quotes, or its id where the text is not known."""
    token, text = found[f"token_{of}"], found.get(f"text_{of}")
    if token is None:
        return "(the end)"
    return str(token) if text is None else json.dumps(text, ensure_ascii=False)


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _own_part(arm: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in arm["provenance"].items()
        if key not in common or common[key] != value
    }
