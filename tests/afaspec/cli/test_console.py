"""Progress without a terminal."""

import io

from rich.console import Console
from rich.progress import MofNCompleteColumn, TextColumn

from afaspec.cli import console as shared
from afaspec.cli.console import Bars


def written(monkeypatch, seconds, *, terminal):
    monkeypatch.setattr(shared, "PLAIN_SECONDS", seconds)
    out = io.StringIO()
    where = Console(file=out, force_terminal=terminal, width=80)
    bars = Bars(TextColumn("{task.description}"), MofNCompleteColumn(), console=where)
    whole = bars.add_task("whole", total=3)
    over = bars.add_task("over", total=2)
    bars.update(over, completed=2)
    bars.update(whole, completed=1)
    bars.update(whole, completed=2)
    return out.getvalue().splitlines()


def test_a_log_gets_a_row_now_and_then_and_not_only_at_the_end(monkeypatch):
    rows = [row.split() for row in written(monkeypatch, 0, terminal=False)]
    assert rows == [["whole", "0/3"], ["whole", "1/3"], ["whole", "2/3"]]


def test_between_two_rows_some_time_passes(monkeypatch):
    assert written(monkeypatch, 3600, terminal=False) == []


def test_a_terminal_gets_bars_alone(monkeypatch):
    assert written(monkeypatch, 0, terminal=True) == []
