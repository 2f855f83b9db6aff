"""Loads, speeds and latencies of a server run on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from bench.report import Report

COLUMNS = ("Load", "Arm", "Tokens/s", "Speedup", "Acceptance\nlength")
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


def render_loads(report: Report) -> Table:
    """A rich table: a row per load and arm; latencies as the median with p99 below."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in (*COLUMNS, *(f"{kind.removesuffix('_ms').upper()}, ms" for kind in LATENCIES)):
        justify: Any = "left" if column in ("Load", "Arm") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for words, arms in _steps(report):
        for row, arm in enumerate(arms):
            latency = arm["latency"]
            table.add_row(
                words if row == 0 else "",
                arm["label"],
                _figure(arm["tokens_per_second"], "{:,.1f}"),
                _figure(arm["speedup"], "{:.2f}×"),
                _figure(arm["acceptance_length"], "{:.2f}"),
                *(_latency(latency[kind]) for kind in LATENCIES),
            )
    return table


def warnings(report: Report) -> list[str]:
    """The warnings of all loads and arms, each once."""
    found = (line for _, arms in _steps(report) for arm in arms for line in arm["warnings"])
    return list(dict.fromkeys(found))


def _steps(report: Report) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    words: list[str] = report.provenance["loads"]
    if report.load is None:
        return [(words[0], report.arms)]
    return [(text, step["arms"]) for text, step in zip(words, report.load, strict=True)]


def _figure(figure: Mapping[str, float] | None, form: str) -> str:
    return form.format(figure["value"]) if figure and figure["value"] is not None else "–"


def _latency(found: Mapping[str, float] | None) -> str:
    return f"{found['p50']:,.1f}\np99 {found['p99']:,.1f}" if found else "–"
