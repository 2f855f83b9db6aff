"""`afaspec what-if`: what another draft, k, load or target would bring, from a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Listed, Settings


class CellSettings(Settings):
    """Which measured cells the answer builds on."""

    GROUP: ClassVar[str] = "Sweep"

    run: Path = Field(description="Folder that `afaspec sweep` wrote.")
    arm: str | None = Field(None, description="Only this draft of the sweep.")
    temperature: float | None = Field(
        None, description="Which cells, where the sweep has several temperatures."
    )
    max_tokens: int | None = Field(
        None, description="Which cells, where the sweep has several lengths."
    )
    draft_sample_method: str | None = Field(
        None, description="Which cells, where drafts sampled in several ways."
    )
    out: Path | None = Field(None, description="File for the answer (default: RUN/what_if.json).")


class QuestionSettings(Settings):
    """What is asked: see `bench.sweep.what_if.Question`, which checks it."""

    GROUP: ClassVar[str] = "Question"

    k: Listed | None = Field(None, description="1,2,3 or 1..8 (default: measured).")
    concurrency: Listed | None = Field(None, description="Requests at once (default: measured).")
    acceptance_length: float | None = Field(
        None, description="Of a better (or worse) draft, at --at-k."
    )
    at_k: int | None = Field(
        None, description="The k of --acceptance-length (default: largest measured)."
    )
    acceptance: Listed | None = Field(
        None, description="Share of drafts accepted up to each position: 0.7,0.5,0.3."
    )
    target_scale: float = Field(1.0, description="Cost of the target's part of a step, times this.")
    overhead_ms: float = Field(
        0.0, description="Milliseconds of that part that do not grow with the target."
    )


class WhatIfConfig(CellSettings, QuestionSettings):
    """A question about a sweep."""


@configured(WhatIfConfig, arguments=("run",))
def what_if(config: WhatIfConfig) -> None:
    """Predict step time and speedup for another draft, k, load or target. Nothing is run.

    A cost model of a step is fitted to what the sweep measured; how far it is off is printed with
    every answer. Beyond the measured k, acceptance goes on falling as it fell.

    [bold]Examples[/]

      afaspec what-if runs/sweep --k 1..8

      afaspec what-if runs/sweep --acceptance-length 3.2 --at-k 3

      afaspec what-if runs/sweep --target-scale 4 --concurrency 1,2,8
    """
    from rich.console import Console

    from afaspec.cli.console import note
    from bench.sweep.cells import read_cells
    from bench.sweep.settings import parse_axis
    from bench.sweep.steps import from_per_position
    from bench.sweep.what_if import Question, answer
    from bench.sweep.what_if_table import choose_cells, fit_words, render
    from drafts.files import write_json

    def axis(text: str | None, option: str, kind: type = int) -> tuple[Any, ...] | None:
        return None if text is None else parse_axis(text, option, kind)

    shares = axis(config.acceptance, "--acceptance", float)
    question = Question(
        ks=axis(config.k, "--k"),
        concurrencies=axis(config.concurrency, "--concurrency"),
        length=config.acceptance_length,
        length_at_k=config.at_k,
        conditional=None if shares is None else tuple(map(float, from_per_position(shares))),
        target_scale=config.target_scale,
        overhead=config.overhead_ms / 1000,
    )
    cells = choose_cells(
        read_cells(config.run), config.temperature, config.max_tokens, config.draft_sample_method
    )
    found = answer(cells, question, arm=config.arm)
    write_json(config.out or config.run / "what_if.json", found.as_json(question))
    Console().print(render(found))
    for line in fit_words(found):
        note(line)
