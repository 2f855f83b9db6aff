"""`afaspec sweep`: measure drafts over a grid of k, load, temperature and answer length."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from afaspec.cli.flags import configured
from afaspec.cli.measure.models import ModelNames
from bench.records.settings import PromptSource
from bench.sweep.settings import SweepSettings


class SweepCommand(SweepSettings, PromptSource, ModelNames):
    """A sweep, with the names of what it opens."""

    GROUP: ClassVar[str] = "Models"

    target: str = Field(description="folder or hub id of the target model, `smollm2` or `embedded`")
    out: Path = Field(Path("runs/sweep"), description="folder of cells and result")


@configured(SweepCommand, arguments=("target",))
def sweep(config: SweepCommand) -> None:
    """Measure drafts over a grid: which k is best at each load, and when to draft at all.

    Every cell is measured beside no speculation, in turns. Finished cells are kept in --out: a
    second run measures what is missing, and the grid may grow. Writes sweep.html, sweep.json,
    sweep.csv and plots there; `afaspec what-if` answers further questions from the same folder.

    [bold]Examples[/]

      afaspec sweep embedded --prompts src/ --draft base=embedded-draft --k 1..5 --concurrency 1,4

      afaspec sweep models/target --prompts eval.jsonl --draft models/draft --ngram --limit 64

      afaspec sweep models/target --prompts eval.jsonl --draft models/draft --temperature 0,0.8
      --draft-sample-method greedy,probabilistic --concurrency 1,8,32 --max-tokens 64,256
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import console, note, progress, working
    from bench.prompts.suites import prompt_source
    from bench.report.console import stage_bars
    from bench.sweep.grid import SweepConfig
    from bench.sweep.page import headline
    from bench.sweep.plots import condition_name
    from bench.sweep.report import build_sweep, write_sweep
    from bench.sweep.run import run_sweep, sweep_provenance
    from drafts.files import require_writable

    out = config.out
    require_writable(out)
    with working("reading the models"):
        settings = SweepConfig(
            **config.shared_with(SweepSettings),
            prompts=prompt_source(config.prompts, config.suite, config.size),
            target=open_target(config.target, config.target_adapter, note),
            arms=config.open_arms(none=False),
        )
    with progress() as bars:
        results = run_sweep(settings, out, stage_bars(bars), note=note)
    result = build_sweep(results, sweep_provenance(settings, out))
    page = write_sweep(result, out)
    note(headline(result))
    for warning in result.provenance.get("warnings", []):
        note(f"Warning: {warning}")
    for finding in result.findings:
        said = " ".join([*finding["words"], finding["advice"]])
        note(f"{finding['label']} ({condition_name(finding)}): {said}")
    for cell in result.cells:
        if cell["refused"]:
            reason = cell["refused"].splitlines()[0]
            note(f"Not run: {cell['label']}, k={cell['k']}: {reason}")
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)
