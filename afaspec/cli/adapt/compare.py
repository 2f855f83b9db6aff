"""`afaspec compare`: whole arms side by side, from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field
from rich import box
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from afaspec.cli.console import Bars, console, note, progress
from afaspec.cli.flags import configured
from afaspec.compare.config import CompareConfig, part, quick
from afaspec.config import load_config
from bench.records.progress import Progress
from bench.records.settings import Settings
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from afaspec.compare.run import Forecast


class StudyConfig(Settings):
    """Which study, and how much of it is to be done now."""

    study: Path = Field(description="YAML file of the study")
    out: Path | None = Field(None, description="folder of all results (default: the study's)")
    settings: list[str] = Field(
        [],
        validation_alias="set",
        description="NAME=VALUE in place of the file's; dots go deeper; repeatable",
    )
    only: list[str] = Field([], description="name of an arm or domain to do now; repeatable")
    quick: bool = Field(
        False,
        description="a small version beside it: at most 40 steps, 2 seeds, one rank, 64 prompts",
    )
    dry_run: bool = Field(False, description="print the plan, with one step of every arm timed")
    stored: list[Path] = Field(
        [],
        validation_alias="from",
        description="study.json(.gz) whose finished cells are taken over; repeatable",
    )
    report_only: bool = Field(False, description="write tables, plots and page again; run nothing")


@configured(StudyConfig, arguments=("study",))
def compare(asked: StudyConfig) -> None:
    """Train whole arms side by side: arms x ranks x budgets x seeds x domains, and compare them.

    Every arm gets the same data in the same order; its learning rate is tuned on a validation split
    by one rule; the results carry intervals over seeds and prompts. Kill it at any time: the same
    command goes on. A study that has grown runs only what is new. See docs/compare.md.

    [bold]Examples[/]

      afaspec compare docs/examples/compare.yaml --dry-run

      afaspec compare docs/examples/compare.yaml

      afaspec compare study.yaml --set 'seeds=[0, 1, 2, 3, 4]' --set arms.lora.rank=4

      afaspec compare study.yaml --only lora --only full --only cpp

      afaspec compare study.yaml --report-only

      afaspec compare study.yaml --from study.json.gz --report-only
    """
    from afaspec.compare.run import forecast, import_study
    from afaspec.compare.run import report_only as write_again
    from afaspec.compare.tables import headline, render_domain, verdicts

    config = read_study(asked)
    for one in asked.stored:
        import_study(config, one)
    if asked.dry_run:
        show_forecast(forecast(config, *open_models(config), note))
        return
    result = write_again(config) if asked.report_only else run_with_bars(config)
    for domain, results in result["domains"].items():
        Console().print(render_domain(domain, results))
        for words in verdicts(results):
            console.print(f"{words}.", highlight=False)
    console.print(headline(result), highlight=False)
    if not result["complete"]:
        console.print("The study is not finished: run it without --report-only to go on.")
    console.print(f"Page: {config.out / 'study.html'}", highlight=False, soft_wrap=True)


def read_study(asked: StudyConfig) -> CompareConfig:
    """The checked study: its file, what is given in place of that, and the part to do now."""
    flags = {"out": asked.out, **dict(parse_setting(text) for text in asked.settings)}
    config = part(load_config(CompareConfig, asked.study, flags), asked.only)
    return quick(config) if asked.quick else config


def open_models(config: CompareConfig) -> tuple[TargetInfo, DraftInfo]:
    """The target and the base draft that the study names."""
    from afaspec.capture.adapted_target import open_target
    from afaspec.pairs.names import open_draft

    return open_target(config.target, config.target_adapter, note), open_draft(config.draft)


def parse_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, with the value read as YAML."""
    name, found, value = text.partition("=")
    try:
        if found and name and (parsed := yaml.safe_load(value)) is not None:
            return name, parsed
    except yaml.YAMLError:
        pass
    raise UserError(
        f"cannot read --set {text!r}", hint="write --set NAME=VALUE, for example steps=200"
    )


def run_with_bars(config: CompareConfig) -> dict[str, Any]:
    """Run the study with one bar for its cells and one for the work of the moment."""
    from afaspec.compare.run import StudyProgress
    from afaspec.compare.run import compare as run

    with progress() as bars:
        whole: list[TaskID] = []

        def study_progress(now: StudyProgress) -> None:
            seconds = now.seconds_left
            left = "" if seconds is None else f"about {format_duration(seconds)} left"
            if not whole:
                whole.append(bars.add_task("study", total=now.total, unit="cells", left=left))
            bars.update(whole[0], completed=now.done, total=now.total, left=left)

        return run(config, *open_models(config), current_bar(bars), study_progress, note)


def current_bar(bars: Bars) -> Progress:
    """A progress callback with one bar, which a new piece of work takes over."""
    held: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        if held.get("what") != what:
            if held:
                bars.remove_task(held["task"])
            held.update(what=what, task=bars.add_task(what, total=total))
        bars.update(held["task"], completed=done, total=total)

    return report


def show_forecast(found: Forecast) -> None:
    """The plan: cells by kind, and what each arm trains and costs."""
    from afaspec.compare.estimate import spent_seconds

    plan, ledger = found.plan, found.ledger
    cells = Table("Cells", "All", "Done", box=box.SIMPLE_HEAD)
    everything = [*plan.tasks, *plan.later]
    for kind in dict.fromkeys(task.kind for task in everything):
        mine = [task for task in everything if task.kind == kind]
        done = sum(task.key in ledger for task in mine)
        cells.add_row(kind, str(len(mine)), str(done))
    arms = Table("Arm", "Trained weights", "Of the draft", "Seconds a step", box=box.SIMPLE_HEAD)
    for label, cost in found.costs.items():
        share = f"{cost.trainable / cost.total:.1%}"
        arms.add_row(label, f"{cost.trainable:,}", share, f"{cost.seconds:.2f}")
    out = Console()
    out.print(cells)
    out.print(arms)
    if spent := spent_seconds(ledger, plan.tasks):
        out.print(f"Done so far: {format_duration(spent)} of work.")
    grids = "without extensions of the grids"
    if found.seconds_left is not None:
        out.print(f"Left: about {format_duration(found.seconds_left)}, {grids}.")
    else:
        trainings = f"{format_duration(found.training_left)} of training ({grids})"
        out.print(f"Left: about {trainings}, and what was never done here yet: answers, vLLM.")


def format_duration(seconds: float) -> str:
    """A duration for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
