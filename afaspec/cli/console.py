"""The console that all commands share: rich on stderr, so that stdout stays for results."""

from __future__ import annotations

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

console = Console(stderr=True)


def note(text: str) -> None:
    """A line of plain text: paths are neither wrapped nor coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    """Units per second, in the task's own `unit`."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("")
        unit = task.fields.get("unit", "it")
        return Text(f"{speed:,.1f} {unit}/s" if speed < 100 else f"{speed:,.0f} {unit}/s")


def progress(refresh_per_second: float = 4) -> Progress:
    """Bar, count, rate, elapsed and remaining time; give tasks a `unit` field to name the rate."""
    return Progress(
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
