"""The console that all commands share: rich on stderr, so that stdout stays for results."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from afaspec.cli.processes import rank

console = Console(stderr=True, quiet=rank() > 0)
PLAIN_SECONDS = 15.0  # between the lines that stand in for bars where there is no terminal
SLOW = 0.1  # units per second below which they are told per minute


def note(text: str) -> None:
    """A line of plain text: paths are neither wrapped nor coloured."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bars(Progress):
    """rich's bars, with the rate since a task's first report (rich's own looks back 30 seconds and
    knows nothing of work that reports more rarely), and lines in their place without a terminal."""

    def start(self) -> None:
        """Show the bars, or begin to write lines."""
        super().start()
        self._begun, self._over = self.get_time(), threading.Event()
        self._writer = threading.Thread(target=self._write_now_and_then, daemon=True)
        if not self.console.is_interactive:
            self._at_end, self.live.transient = not self.live.transient, True
            self._writer.start()

    def stop(self) -> None:
        """End them, with a last look at every task."""
        if not self.live.is_started or self.console.is_interactive:
            super().stop()
            return
        self._over.set()
        self._writer.join()
        self.live.stop()
        if self._at_end:
            self._write(self.tasks)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As rich's. A count that falls begins the task anew."""
        task = self._tasks[task_id]
        if changes.get("completed", task.completed) < task.completed:
            self.reset(task_id)
            task.fields = {k: v for k, v in task.fields.items() if k not in ("first", "last")}
        super().update(task_id, **changes)
        told = self.get_time(), task.completed
        task.fields.setdefault("first", told)
        if task.completed > task.fields.setdefault("last", told)[1]:
            task.fields["last"] = told

    def _write_now_and_then(self) -> None:
        while not self._over.wait(PLAIN_SECONDS):
            under_way = [task for task in self.tasks if task.started and not task.finished]
            self._write(under_way)
            if not under_way:
                self.console.print(f"working  {_duration(self.get_time() - self._begun)}")

    def _write(self, tasks: list[Task]) -> None:
        """A line for each, of all columns but the bar."""
        for task in tasks:
            parts = [
                str(column(task)).strip()
                for column in self.columns
                if isinstance(column, ProgressColumn) and not isinstance(column, BarColumn)
            ]
            line = "  ".join(filter(None, parts))
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def rate(task: Task) -> float | None:
    """Units per second from the task's first report to the last that told of more."""
    (began, had), (now, has) = (task.fields.get(name, (0.0, 0)) for name in ("first", "last"))
    return (has - had) / (now - began) if has > had and now > began else None


def seconds_left(task: Task) -> float | None:
    """Until its end at that rate, counted down since the last report."""
    pace = rate(task)
    if pace is None or task.total is None:
        return None
    told, done = task.fields["last"]
    return float(max(0.0, (task.total - done) / pace - (task.get_time() - told)))


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


class CountColumn(MofNCompleteColumn):
    """How many of how many; nothing where nothing is counted."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text("")


class RateColumn(ProgressColumn):
    """Units per second or minute, in the task's own `unit`."""

    def render(self, task: Task) -> Text:
        pace, unit = rate(task), task.fields.get("unit", "it")
        if pace is None:
            return Text("")
        if pace < SLOW:
            return Text(f"{60 * pace:.1f} {unit}/min")
        return Text(f"{pace:,.1f} {unit}/s" if pace < 100 else f"{pace:,.0f} {unit}/s")


class LeftColumn(ProgressColumn):
    """The time left: the task's own words of it (`left`), or by its rate."""

    def render(self, task: Task) -> Text:
        if "left" in task.fields:
            return Text(task.fields["left"])
        if task.total is None:
            return Text("")
        seconds = 0.0 if task.finished else seconds_left(task)
        return Text(f"eta {'-:--:--' if seconds is None else _duration(seconds)}")


def progress(refresh_per_second: float = 4, **options: Any) -> Bars:
    """Bar, count, rate, elapsed and remaining time; give tasks a `unit` field to name the rate."""
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        CountColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        LeftColumn(),
        console=console,
        refresh_per_second=refresh_per_second,
        **options,
    )


@contextmanager
def working(what: str) -> Iterator[None]:
    """Say `what` is being done while it lasts, where nothing of it can be counted."""
    with progress(transient=True) as bars:
        bars.add_task(what, total=None)
        yield
