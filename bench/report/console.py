"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.report.words import COLUMNS, TableCell, table_rows

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

    from bench.records.progress import Progress
    from bench.report.schema import Report


UNITS = {"starting engines": "engines", "measuring": "prompts"}


def render_table(report: Report) -> Table:
    """A rich table: a row per arm, intervals below the values, the best of each column bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def render(cell: TableCell) -> Text:
        text = Text(cell.text, style="bold green" if cell.best else "bold")
        if cell.detail:
            text.append(f"\n{cell.detail}", style="not bold dim")
        return text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for column in COLUMNS:
        first = column == COLUMNS[0]
        table.add_column(
            column.replace(" ", "\n"), justify="left" if first else "right", no_wrap=True
        )
    for row in table_rows(report.arms):
        table.add_row(*(render(cell) for cell in row))
    return table


def stage_bars(bars: Bars) -> Progress:
    """A progress callback for `run_bench` that keeps one bar per stage."""
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, unit=UNITS.get(stage, "it"))
        bars.update(tasks[stage], completed=done, total=total)

    return report


LOAD_COLUMNS = ("", "Tokens/s", "Speedup", "Accept.\nlength")
LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


def render_loads(report: Report) -> Table:
    """A rich table: a row per arm below each load; latencies as the median with p99 below."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    names = (kind.removesuffix("_ms").upper() for kind in LATENCIES)
    for column in (*LOAD_COLUMNS, *(f"{name} ms\n(p99)" for name in names)):
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
