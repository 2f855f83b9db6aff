"""The console that all commands share: rich on stderr, so that stdout stays for results."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from afaspec.cli.processes import rank

console = Console(stderr=True, quiet=rank() > 0)
PLAIN_SECONDS = 30.0  # between the lines that stand in for bars where there is no terminal


def note(text: str) -> None:
    """A line of plain text: paths are neither wrapped nor coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bars(Progress):
    """rich's bars; into a file or a pipe, where they would appear at the end alone, a row of them
    now and then, so that a log says how far the work is."""

    def __init__(self, *columns: ProgressColumn, **options: Any):
        super().__init__(*columns, **options)
        self._written = time.monotonic()

    def update(self, *args: Any, **changes: Any) -> None:
        super().update(*args, **changes)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._written >= PLAIN_SECONDS:
            self._written = now
            unfinished = [task for task in self.tasks if not task.finished]
            self.console.print(self.make_tasks_table(unfinished))


class RateColumn(ProgressColumn):
    """Units per second, in the task's own `unit`."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        unit = task.fields.get("unit", "it")
        return Text(f"{speed:,.1f} {unit}/s" if speed < 100 else f"{speed:,.0f} {unit}/s")


def progress(refresh_per_second: float = 4) -> Bars:
    """Bar, count, rate, elapsed and remaining time; give tasks a `unit` field to name the rate."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=refresh_per_second,
    )
