"""`afaspec loop`: a running server's draft follows its traffic."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings

if TYPE_CHECKING:
    from afaspec.loop.config import LoopConfig

TELL_SECONDS = 15.0  # between lines of progress


class LoopCommand(Settings):
    """What is asked of a loop."""

    action: Literal["run", "status", "report"] = Field(description="what to do")
    loop: Path = Field(description="its configuration (YAML), or its folder for status and report")


@configured(LoopCommand, arguments=("action", "loop"))
def loop(config: LoopCommand) -> None:
    """Run the loop that LOOP describes, say what it did, or write its page.

    It watches the server, and where acceptance falls it tries whether adapting would help, trains
    on recent traffic mixed with general prompts, measures the new draft in vLLM against the one
    that serves, puts it in, holds it against the old one on live traffic, and takes it back where
    it disappoints. Each step is a line in a journal with its reason: a loop that was killed goes on
    where it was. docs/live.md has a configuration.

    [bold]Examples[/]

      afaspec serve smollm2 --draft smollm2-draft --swappable --collect traffic --sample-rate 1

      afaspec loop run loop.yaml

      afaspec loop status loop.yaml

      afaspec loop report runs/loop
    """
    given = config.loop
    if config.action == "run":
        _run(_read(given))
        return
    folder = given if given.is_dir() else _read(given).out
    if config.action == "report":
        from afaspec.cli.console import console
        from afaspec.loop.page import write_report

        console.print(f"Report: {write_report(folder)}", highlight=False, soft_wrap=True)
    else:
        _show(folder)


def _read(file: Path) -> LoopConfig:
    from afaspec.config import load_config
    from afaspec.loop.config import LoopConfig

    return load_config(LoopConfig, file, {})


def _run(config: LoopConfig) -> None:
    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import note
    from afaspec.loop.run import run_loop
    from serving.runtime import require_vllm

    require_vllm()
    target = open_target(config.target, config.target_adapter, note)
    run_loop(config, target, Teller(note).stage, note)


class Teller:
    """Progress as lines, now and then: a loop writes to a log for weeks."""

    def __init__(self, note: Callable[[str], None]):
        self.note, self.name = note, ""
        self.began = self.told = 0.0
        self.first = 0

    def stage(self, name: str, done: int, total: int) -> None:
        """How far a stage is."""
        now = time.monotonic()
        if name != self.name:
            self.name, self.began, self.first, self.told = name, now, done, now
            return
        if now - self.told < TELL_SECONDS:
            return
        self.told = now
        rate = (done - self.first) / (now - self.began)
        left = f", {(total - done) / rate / 60:.1f} min left" if rate > 0 else ""
        self.note(f"{name}: {done:,} of {total:,}{left}")


def _show(folder: Path) -> None:
    from rich.table import Table

    from afaspec.cli.console import console, note
    from afaspec.loop.page import COLUMNS, cycles_of, read_loop

    history = read_loop(folder)
    table = Table(*(name.lower() for name in COLUMNS))
    for row in cycles_of(history):
        table.add_row(*row)
    if table.rows:
        console.print(table)
    last = history.last
    note(f"{last.state} since {last.when} UTC: {last.words}")
