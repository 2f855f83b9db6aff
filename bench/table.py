"""The report on the console: its table, and the progress of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.summary import COLUMNS, Cell, table_rows

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

    from bench.measure import Progress
    from bench.report import Report

UNITS = {"starting engines": "engines", "measuring": "prompts"}


def render_table(report: Report) -> Table:
    """A rich table: a row per arm, intervals below the values, the best of each column bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def render(cell: Cell) -> Text:
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
