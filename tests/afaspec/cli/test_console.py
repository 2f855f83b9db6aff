"""Progress: rates and times left of work that reports in bursts, on terminals and in logs."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Task

from afaspec.cli import console as shared
from afaspec.cli.console import Bars, LeftColumn, RateColumn, rate, working

ROOT = Path(__file__).parents[3]


class Clock:
    """Time that passes when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def bars_by(clock: Clock) -> Bars:
    where = Console(file=io.StringIO(), force_terminal=True, width=100)
    return Bars(RateColumn(), LeftColumn(), console=where, get_time=clock)


def added(bars: Bars, what: str, **settings: Any) -> Task:
    number = bars.add_task(what, **settings)
    return next(task for task in bars.tasks if task.id == number)


def shown(task: Task) -> tuple[str, str]:
    left = LeftColumn()
    left.max_refresh = None
    return RateColumn().render(task).plain, left.render(task).plain


def test_bursts_further_apart_than_rich_looks_back_have_a_rate(clock: Clock) -> None:
    bars = bars_by(clock)
    task = added(bars, "capture", total=100, unit="prompts")
    bars.update(task.id, completed=0)
    assert shown(task) == ("", "eta -:--:--")
    clock.now += 120
    bars.update(task.id, completed=24)
    assert shown(task) == ("0.2 prompts/s", "eta 0:06:20")
    clock.now += 100
    assert shown(task) == ("0.2 prompts/s", "eta 0:04:40")  # counts down while nothing is told
    bars.update(task.id, completed=24)
    assert shown(task) == ("0.2 prompts/s", "eta 0:04:40")  # nor is the same count news
    clock.now += 20
    bars.update(task.id, completed=48)
    assert shown(task) == ("0.2 prompts/s", "eta 0:04:20")
    clock.now += 1000
    assert shown(task)[1] == "eta 0:00:00"


def test_what_a_run_had_when_it_went_on_is_no_speed(clock: Clock) -> None:
    bars = bars_by(clock)
    task = added(bars, "lora", total=1000, unit="step")
    bars.update(task.id, completed=900)
    assert rate(task) is None
    clock.now += 600
    bars.update(task.id, completed=905)
    assert shown(task) == ("0.5 step/min", "eta 3:10:00")


def test_a_stage_that_begins_anew_is_measured_anew(clock: Clock) -> None:
    bars = bars_by(clock)
    task = added(bars, "measuring", total=10)
    for done in (0, 10):
        bars.update(task.id, completed=done)
        clock.now += 10
    assert task.finished
    assert shown(task) == ("1.0 it/s", "eta 0:00:00")
    bars.update(task.id, completed=0, total=20)
    assert not task.finished
    assert shown(task) == ("", "eta -:--:--")
    clock.now += 10
    bars.update(task.id, completed=5)
    assert shown(task) == ("0.5 it/s", "eta 0:00:30")


def test_a_task_may_know_its_time_better(clock: Clock) -> None:
    bars = bars_by(clock)
    task = added(bars, "study", total=9, left="about 5 min left")
    bars.update(task.id, completed=3)
    assert shown(task)[1] == "about 5 min left"


class Child:
    """A process without a terminal that works as it is told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.afaspec.cli.bursts"],
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def tell(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def line(self, wanted: Callable[[str], bool] = lambda line: True) -> str:
        """The next such line. Waits until it comes."""
        assert self.process.stderr
        return next(line.rstrip("\n") for line in self.process.stderr if wanted(line))


def test_lines_come_while_no_update_does() -> None:
    child = Child()
    try:
        assert child.line().startswith("working  0:00:0")
        child.tell("measuring,0,400")
        first = child.line(lambda line: "measuring" in line)
        assert re.fullmatch(r"measuring  0/400  0:00:\d\d  eta -:--:--", first)
        child.tell("measuring,300,400")
        lines = [child.line(lambda line: "300/400" in line) for _ in range(3)]  # of one update
        for line in lines:
            told = re.fullmatch(
                r"measuring  300/400  [\d.,]+ prompts/s  0:00:\d\d  eta 0:\d\d:\d\d", line
            )
            assert told, line
        child.tell("measuring,400,400")
        assert child.line(lambda line: "working" in line)  # between two stages as well
        _, err = child.process.communicate()
        assert re.fullmatch(r"measuring  400/400 .* eta 0:00:00", err.splitlines()[-1])
        assert child.process.returncode == 0
    finally:
        child.process.kill()
        child.process.communicate()


def test_a_log_gets_no_bar_and_no_wrapped_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(shared, "console", Console(file=out, width=40))
    with shared.progress() as bars:
        task = bars.add_task("a description that alone fills such a line", total=3)
        bars.update(task, completed=1)
        assert out.getvalue() == ""  # a bar's redrawing is for terminals
    (line,) = out.getvalue().splitlines()
    assert line.startswith("a description that alone fills such a line  1/3  0:00:0")


def test_a_log_gets_nothing_of_what_was_soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(shared, "console", Console(file=out, width=40))
    with working("merging"):
        pass
    with shared.progress():
        pass
    assert out.getvalue() == ""
