"""Loads, speeds and latencies of a server run on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from bench.report import Report

COLUMNS = ("", "Tokens/s", "Speedup", "Accept.\nlength")
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


def render_loads(report: Report) -> Table:
    """A rich table: a row per arm below each load; latencies as the median with p99 below."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    names = (kind.removesuffix("_ms").upper() for kind in LATENCIES)
    for column in (*COLUMNS, *(f"{name} ms\n(p99)" for name in names)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for words, arms in _steps(report):
        table.add_row(words, style="bold")
        for arm in arms:
            table.add_row(
                f"  {arm['label']}",
                _figure(arm["tokens_per_second"], "{:,.1f}"),
                _figure(arm["speedup"], "{:.2f}×"),
                _figure(arm["acceptance_length"], "{:.2f}"),
                *(_latency(arm["latency"][kind]) for kind in LATENCIES),
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
    return f"{found['p50']:,.1f}\n({found['p99']:,.1f})" if found else "–"
