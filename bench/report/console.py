"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.progress import Progress as Bars
from rich.progress import TaskID
from rich.table import Table
from rich.text import Text

from bench.records.progress import Progress
from bench.records.speeds import speed_of
from bench.report.schema import Report
from bench.report.words import (
    KEPT,
    NOTHING,
    PER_STEP,
    RATE,
    TableCell,
    figure_cell,
    table_columns,
    table_rows,
)

UNITS = {"starting engines": "engines", "measuring": "prompts"}


def render_table(report: Report) -> Table:
    """A rich table: a row per arm, intervals below the values, the best of each column bold.

    80 columns have no room for the acceptance rate, which says what the length says, and beside
    what was kept of general acceptance none for the tokens that a step delivered.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    columns = table_columns(report.arms)
    left_out = {RATE, *([PER_STEP] if KEPT in columns else [])}
    shown = [i for i, name in enumerate(columns) if name not in left_out]
    for i in shown:
        title = columns[i].replace(" ", "\n")
        table.add_column(title, justify="right" if i else "left", overflow="fold")
    for row in table_rows(report.arms):
        cells = (row[i] for i in shown)
        table.add_row(*(cell_text(c, "bold" if c.best else "") for c in cells))
    return table


def cell_text(cell: TableCell, style: str = "", mark: str = "") -> Text:
    """A cell for the terminal: the value after its `mark`, the detail dim below it."""
    text = Text(mark + cell.text, style)
    if cell.detail:
        text.append(f"\n{cell.detail}", style="not bold dim")
    return text


def stage_bars(bars: Bars) -> Progress:
    """A progress callback for `run_bench` that keeps one bar per stage."""
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, unit=UNITS.get(stage, "it"))
        bars.update(tasks[stage], completed=done, total=total)

    return report


LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")


def render_loads(report: Report) -> Table:
    """A rich table: a row per arm below each load; latencies as the median with p99 below."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    names = (kind.removesuffix("_ms").upper() for kind in LATENCIES)
    speed = speed_of(report.arms[0])
    columns = ("", f"{speed.label}\ntokens/s", "Speedup", "Accept.\nlength")
    for column in (*columns, *(f"{name} ms\n(p99)" for name in names)):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    steps = [{"arms": report.arms}] if report.load is None else report.load
    for words, step in zip(report.provenance["loads"], steps, strict=True):
        table.add_row(words, style="bold")
        for arm in step["arms"]:
            table.add_row(
                f"  {arm['label']}",
                figure_cell(arm[speed.rate], "{:,.1f}").text,
                figure_cell(arm[speed.speedup], "{:.2f}×").text,
                figure_cell(arm["acceptance_length"], "{:.2f}").text,
                *(_latency(arm["latency"][kind]) for kind in LATENCIES),
            )
    return table


def warnings(report: Report) -> list[str]:
    """What to know before the figures are trusted: of all loads and arms, each once."""
    steps = [report.arms, *(step["arms"] for step in report.load or [])]
    said = (text for arms in steps for arm in arms for text in arm.get("warnings") or [])
    return list(dict.fromkeys(said))


def _latency(found: Mapping[str, float] | None) -> str:
    return f"{found['p50']:,.1f}\n({found['p99']:,.1f})" if found else NOTHING
