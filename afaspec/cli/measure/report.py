"""`afaspec report`: compare finished runs, render one again, hold one against a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer
from pydantic import Field, field_validator
from rich.console import Console

from afaspec.cli.console import console, note
from afaspec.cli.flags import configured
from afaspec.cli.measure.gate import GateSettings, hold, read_baselines
from bench.report.console import render_table
from bench.report.words import sentences
from bench.runs.gate import EXIT_CODE
from bench.runs.saved import SavedRun, read_run
from drafts.errors import UserError

OWN = "general"  # in the place of a run: the run's own figures of general prompts


class ReportConfig(GateSettings):
    """Which runs are shown or held against a baseline."""

    GROUP = GateSettings.GROUP

    runs: list[Path] = Field(
        description="report.json of a run, or its folder; or what vllm bench serve "
        "(--save-detailed), guidellm or AIPerf wrote; the first is the reference"
    )
    out: Path | None = Field(None, description="folder for the page (one run: default its own)")
    keep: str | None = Field(
        None,
        description="a run of the same drafts over general prompts, shown beside this one: "
        "RUN=0.98 gives exit code 3 if a draft keeps less than 98% of the base draft's acceptance "
        "length there, beyond its interval; RUN=0 only shows it; for RUN `general` means the run's "
        "own figures of general prompts, as a demo has them",
    )

    export: Literal["vllm-bench", "aiperf"] | None = Field(
        None,
        description="write a server run into --out as files of `vllm bench serve` or AIPerf",
    )

    @field_validator("keep")
    @classmethod
    def _run_and_share(cls, keep: str | None) -> str | None:
        if keep is not None:
            kept_run(keep)
        return keep


def kept_run(text: str) -> tuple[Path, float]:
    """The run and the share that `RUN=SHARE` names. Raises `ValueError` for anything else."""
    run, _, number = text.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = -1.0
    if not run or not 0 <= share <= 1:
        raise ValueError("expected RUN=SHARE with a share from 0 to 1, such as runs/general=0.98")
    return Path(run), share


@configured(ReportConfig, arguments=("runs",))
def report(config: ReportConfig) -> None:
    """Compare runs that `afaspec bench` measured, or render one again. Measures nothing.

    With several runs: each arm of the later ones beside the same of the first, with intervals, and
    the settings that differ. With one: its table, page, plots and CSV are made again. With one and
    --gate: exit code 3 if it is worse than the baseline by more than chance; no page without --out.
    --keep shows acceptance on general prompts beside it, and can require it.

    [bold]Examples[/]

      afaspec report runs/monday runs/tuesday --out runs/compared

      afaspec report runs/bench

      afaspec report runs/bench --gate baseline/report.json --gate-tolerance 0.02

      afaspec report runs/bench --keep runs/bench-general=0.98

      afaspec report runs/demo --keep general=0.97

      afaspec report last-year.json guidellm.json --out runs/compared

      afaspec report runs/served --export vllm-bench --out runs/served/vllm-bench
    """
    from bench.interchange.read import read_any_runs

    out = config.out
    if config.gate and len(config.runs) > 1:
        raise UserError(
            "--gate holds one run against the baseline", hint="give one report.json with --gate"
        )
    if config.keep is not None and len(config.runs) > 1:
        raise UserError(
            "--keep is about the drafts of one run", hint="give one report.json with --keep"
        )
    baselines = read_baselines(config.gate)
    saved = read_any_runs(config.runs)
    if config.export is not None:
        _export(saved, config.export, out)
        return
    if len(saved) == 1:
        _show(saved[0])
        failures = _keep(saved[0], config.keep) if config.keep else []
        if not baselines or out is not None:
            _render(saved[0], out)
        for words in failures:
            note(f"{words}.")
    else:
        _compare(saved, out)
        failures = []
    if baselines:
        hold(baselines, saved[0], config.gate_tolerance)
    if failures:
        raise typer.Exit(EXIT_CODE)


def _export(runs: list[SavedRun], tool: Literal["vllm-bench", "aiperf"], out: Path | None) -> None:
    from bench.interchange.write import export

    if len(runs) > 1 or out is None:
        raise UserError("--export writes one run into --out", hint="give one run, and --out FOLDER")
    for path in export(runs[0], tool, out):
        note(f"Written: {path}")


def _keep(run: SavedRun, keep: str) -> list[str]:
    """Show what the run's drafts keep on general prompts; the sentences of those that lost more."""
    from bench.runs.keep import kept_on, kept_within, lost, render_kept

    path, share = kept_run(keep)
    if str(path) == OWN and not path.exists():
        name, found = "general prompts", kept_within(run)
    else:
        general = read_run(path)
        name, found = general.name, kept_on(run, general)
    Console().print(render_kept(found, run, name))
    return lost(found, name, share)


def _show(run: SavedRun) -> None:
    Console().print(render_table(run.report))
    console.print(sentences(run.report.arms), highlight=False)


def _render(run: SavedRun, out: Path | None) -> None:
    from bench.report.files import render_report, write_report

    here = run.path.parent
    if out is None or out.resolve() == here.resolve():
        note(f"Report: {render_report(run.report, here)}")
    else:
        note(f"Report: {write_report(run.report, out)}")


def _compare(runs: list[SavedRun], out: Path | None) -> None:
    from bench.runs import page
    from bench.runs.compare import compare_runs

    found = compare_runs(runs)
    Console().print(page.render_table(found))
    for text in [*found.missing, *found.cautions]:
        note(f"{text}.")
    if found.settings:
        console.print("[bold yellow]Settings that differ:[/]")
        for name, values in found.settings.items():
            note(f"  {name}: {' | '.join(str(value) for value in values)}")
    console.print(page.headline(found), highlight=False)
    if out is not None:
        note(f"Page: {page.write_comparison(found, out)}")
