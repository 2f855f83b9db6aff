"""`afaspec report`: compare finished runs, render one again, hold one against a baseline."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from rich.console import Console

from afaspec.cli.console import console, note
from afaspec.cli.flags import configured
from afaspec.cli.measure.gate import GateSettings, hold, read_baseline
from bench.report.console import render_table
from bench.report.words import headline
from bench.runs.saved import SavedRun, read_runs
from drafts.errors import UserError


class ReportConfig(GateSettings):
    """Which runs are shown or held against a baseline."""

    GROUP = GateSettings.GROUP

    runs: list[Path] = Field(
        description="report.json of a run, or its folder; the first is the reference"
    )
    out: Path | None = Field(None, description="folder for the page (one run: default its own)")


@configured(ReportConfig, arguments=("runs",))
def report(config: ReportConfig) -> None:
    """Compare runs that `afaspec bench` measured, or render one again. Measures nothing.

    With several runs: each arm of the later ones beside the same of the first, with intervals, and
    the settings that differ. With one: its table, page, plots and CSV are made again. With one and
    --gate: exit code 3 if it is worse than the baseline by more than chance; no page without --out.

    [bold]Examples[/]

      afaspec report runs/monday runs/tuesday --out runs/compared

      afaspec report runs/bench

      afaspec report runs/bench --gate baseline/report.json --gate-tolerance 0.02
    """
    out = config.out
    if config.gate is not None and len(config.runs) > 1:
        raise UserError(
            "--gate holds one run against the baseline", hint="give one report.json with --gate"
        )
    baseline = read_baseline(config.gate)
    saved = read_runs(config.runs)
    if len(saved) == 1:
        _show(saved[0])
        if baseline is None or out is not None:
            _render(saved[0], out)
    else:
        _compare(saved, out)
    if baseline is not None:
        hold(baseline, saved[0], config.gate_tolerance)


def _show(run: SavedRun) -> None:
    Console().print(render_table(run.report))
    console.print(headline(run.report.arms), highlight=False)


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
