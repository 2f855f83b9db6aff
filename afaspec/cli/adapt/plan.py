"""`afaspec plan`: what capture, training and bench will take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afaspec.cli.flags import configured
from afaspec.planning.config import PlanConfig

if TYPE_CHECKING:
    from rich.table import Table

    from afaspec.planning.estimate import Estimate


@configured(PlanConfig, arguments=("target", "prompts"))
def plan(config: PlanConfig) -> None:
    """Say what it takes to adapt DRAFT to PROMPTS on this machine, before it is begun.

    Small runs of capture, training and bench are timed, and scaled to what is asked for: minutes,
    disk, memory and, with --price, money. With --tokens-per-day it says after how many days of
    serving a gain in speed has paid for the work. All of it goes to plan.json in --out.

    [bold]Examples[/]

      afaspec plan MODEL traffic.jsonl --draft DRAFT --limit 20000 --steps 2000

      afaspec plan MODEL traffic.jsonl --draft DRAFT --price 2.5 --tokens-per-day 1e8

      afaspec plan embedded afaspec --draft embedded-draft --limit 320 --bench-prompts 20
    """
    from rich.console import Console

    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import note, progress
    from afaspec.pairs.names import open_draft
    from afaspec.planning.estimate import estimate
    from drafts.files import write_json

    names = ["capture", "train", *(["bench"] if config.bench_prompts else [])]
    with progress() as bars:
        task = bars.add_task("samples", total=len(names), unit="stage")
        found = estimate(
            config,
            open_target(config.target, config.target_adapter, note),
            open_draft(config.draft),
            lambda name: bars.update(
                task, completed=names.index(name), description=f"sample of {name}"
            ),
            note,
        )
        bars.update(task, completed=len(names), description="samples")
    write_json(config.out / "plan.json", found.as_json())
    console = Console()
    console.print(table(found, config))
    for line in words(found, config):
        console.print(line, highlight=False, soft_wrap=True)


def table(found: Estimate, config: PlanConfig) -> Table:
    """A row for each stage, and their sum."""
    from rich.table import Table

    from afaspec.capture.memory import size

    made = Table("stage", "time", "disk", "memory")
    for column in made.columns[1:]:
        column.justify = "right"
    for stage in found.stages:
        made.add_row(stage.name, spoken(stage.seconds), size(stage.disk), size(stage.memory))
    disk = size(sum(stage.disk for stage in found.stages))
    made.add_row("all", spoken(found.seconds), disk, "", style="bold")
    return made


def words(found: Estimate, config: PlanConfig) -> list[str]:
    """What it costs, when it has paid, and what has to change."""
    lines = list(found.advice)
    if found.cost is not None:
        lines.append(f"At {config.price:g} an hour that is {found.cost:.2f}.")
    for gain, days in found.payback.items():
        lines.append(
            f"A draft that serves {gain:g} times as fast has saved that time after "
            f"{days:.2g} days of {config.tokens_per_day:,.0f} tokens."
        )
    return lines


def spoken(seconds: float) -> str:
    """A duration for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
