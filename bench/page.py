"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from bench.plots import colours_of, svg_plots
from bench.summary import COLUMNS, Cell, headline, settings_line, table_rows
from drafts.files import atomic_file

if TYPE_CHECKING:
    from bench.report import Report

SHOWN_DIFFERENCES = 50
BEST = " class='best'"


def write_page(report: Report, path: Path) -> Path:
    """Write the page atomically; returns `path`."""
    with atomic_file(path) as temporary:
        temporary.write_text(render_page(report), encoding="utf-8")
    return path


def render_page(report: Report) -> str:
    """The page: what was found, a table, plots, differences, and how it was measured."""
    template = Template((files("bench") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title="Draft benchmark",
        headline=escape(headline(report.arms)),
        settings=escape(settings_line(report.provenance)),
        table=_table(report),
        plots="\n".join(f"<figure>{svg}</figure>" for _, svg in svg_plots(report)),
        differences=_differences(report),
        provenance=_provenance(report),
        time=escape(str(report.provenance["time"])),
    )


def _table(report: Report) -> str:
    colours = colours_of(report.arms)
    head = "".join(f"<th scope='col'>{escape(column)}</th>" for column in COLUMNS)
    body = ""
    for arm, (first, *rest) in zip(report.arms, table_rows(report.arms), strict=True):
        swatch = f"<i style='background:{colours[arm['name']]}'></i>"
        cells = "".join(_cell(cell, column) for cell, column in zip(rest, COLUMNS[1:], strict=True))
        body += f"<tr><th scope='row'>{swatch}{escape(first.text)}</th>{cells}</tr>\n"
    return f"<table class='result'><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(cell: Cell, column: str) -> str:
    value = f"<b{BEST if cell.best else ''}>{escape(cell.text)}</b>"
    detail = f"<small>{escape(cell.detail)}</small>" if cell.detail else ""
    return f"<td data-column='{escape(column)}'><span>{value}{detail}</span></td>"


def _differences(report: Report) -> str:
    rows = [
        (arm["label"], difference)
        for arm in report.arms
        if arm["lossless"]
        for difference in arm["lossless"]["differences"]
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
    head = "".join(
        f"<th scope='col'>{name}</th>"
        for name in ("Arm", "Prompt", "Position", "Token", "Instead", "Gap (nats)", "Near-tie")
    )
    body = "".join(
        f"<tr><td>{escape(label)}</td><td>{escape(str(found['prompt']))}</td>"
        f"<td>{found['position']}</td><td>{found['token_none']}</td><td>{found['token_arm']}</td>"
        f"<td>{_gap(found)}</td><td>{'yes' if found['near_tie'] else 'no'}</td></tr>"
        for label, found in rows[:SHOWN_DIFFERENCES]
    )
    more = len(rows) - SHOWN_DIFFERENCES
    rest = f"<p>{more} more are in report.json.</p>" if more > 0 else ""
    return (
        f"<section><h2>Where outputs differ</h2><p>{escape(said)}</p>"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"</div>{rest}</section>"
    )


def _gap(found: Mapping[str, Any]) -> str:
    gap = found["gap"] if found["gap"] is not None else found["gap_prefill"]
    return "not in the top 20" if gap is None else f"{gap:.4f}"


def _provenance(report: Report) -> str:
    drafts = "".join(
        f"<h3>{escape(arm['label'])}</h3>{_definitions(_own_part(arm, report.provenance))}"
        for arm in report.arms
    )
    return _definitions(report.provenance) + drafts


def _own_part(arm: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in arm["provenance"].items()
        if key not in common or common[key] != value
    }


def _definitions(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in values.items()
    )
    return f"<dl>{rows}</dl>"


def _plain(value: Any) -> str:
    """A setting's value as a reader writes it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(part) for part in value)
    return value if isinstance(value, str) else json.dumps(value)
