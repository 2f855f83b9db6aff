"""`afaspec what-if`: what another draft, k, load or target would bring, from a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def what_if(
    run: Annotated[Path, typer.Argument(help="Folder that `afaspec sweep` wrote.")],
    k: Annotated[str | None, typer.Option("--k", help="1,2,3 or 1..8 (default: measured).")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Requests at once (default: measured).")
    ] = None,
    acceptance_length: Annotated[
        float | None, typer.Option(help="Of a better (or worse) draft, at --at-k.")
    ] = None,
    at_k: Annotated[
        int | None, typer.Option(help="The k of --acceptance-length (default: largest measured).")
    ] = None,
    acceptance: Annotated[
        str | None, typer.Option(help="Share of drafts accepted up to each position: 0.7,0.5,0.3.")
    ] = None,
    target_scale: Annotated[
        float, typer.Option(help="Cost of the target's part of a step, times this.")
    ] = 1.0,
    overhead_ms: Annotated[
        float, typer.Option(help="Milliseconds of that part that do not grow with the target.")
    ] = 0.0,
    arm: Annotated[str | None, typer.Option(help="Only this draft of the sweep.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Which cells, where the sweep has several temperatures.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Which cells, where the sweep has several lengths.")
    ] = None,
    draft_sample_method: Annotated[
        str | None, typer.Option(help="Which cells, where drafts sampled in several ways.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the answer (default: RUN/what_if.json).")
    ] = None,
) -> None:
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
    from bench.sweep.expected_steps import from_per_position
    from bench.sweep.grid import parse_axis
    from bench.sweep.what_if import Question, answer
    from bench.sweep.what_if_table import choose_cells, fit_words, render
    from drafts.files import write_json

    shares = None if acceptance is None else parse_axis(acceptance, "--acceptance", float)
    question = Question(
        ks=None if k is None else parse_axis(k, "--k"),
        concurrencies=None if concurrency is None else parse_axis(concurrency, "--concurrency"),
        length=acceptance_length,
        length_at_k=at_k,
        conditional=tuple(map(float, from_per_position(shares))) if shares is not None else None,
        target_scale=target_scale,
        overhead=overhead_ms / 1000,
    )
    cells = choose_cells(read_cells(run), temperature, max_tokens, draft_sample_method)
    found = answer(cells, question, arm=arm)
    write_json(out or run / "what_if.json", found.as_json(question))
    Console().print(render(found))
    for line in fit_words(found):
        note(line)
