"""`afaspec watch`: is the draft of a running server still accepted as it was?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings
from drafts.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from afaspec.loop.watch import Figures, Look

DROPPED = 4  # the exit code
PLAIN_SECONDS = 15.0  # between lines, where there is no terminal


class WatchConfig(Settings):
    """Which server, and how it is looked at."""

    url: str = Field(description="a vLLM server that drafts")
    model: str | None = Field(None, description="the name that it serves the model by")
    every: float = Field(5.0, gt=0, description="seconds between looks at its /metrics")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="chance of ever calling a drop where there is none"
    )
    out: Path | None = Field(None, description="file that gets a line of JSON a look")
    export_port: int | None = Field(
        None, ge=1, le=65535, description="port of this machine with the figures for Prometheus"
    )
    step_cost: float | None = Field(
        None,
        gt=0,
        description="of a step with drafts, in steps without: a bench's acceptance length over its "
        "speedup; gives an estimate of the speedup now",
    )
    until_drop: bool = Field(False, description="leave with exit code 4 when a drop is called")


@configured(WatchConfig, arguments=("url",))
def watch(config: WatchConfig) -> None:
    """Look at the server at URL again and again: what its draft is accepted, and whether it fell.

    The first 40 looks with traffic (and 3,000 drafts) are the baseline; a drop is called where
    later traffic is accepted less beyond doubt. Drift is 1 then. The chance of a call in vain,
    however long one looks, is --alpha, as long as looks do not hang together. Requests with a tag
    (header x-afaspec-tag) are looked at by tag too, where `afaspec serve` counts so (--swappable or
    --collect).

    [bold]Examples[/]

      afaspec watch http://127.0.0.1:8000

      afaspec watch http://127.0.0.1:8000 --every 1 --out watch.jsonl

      afaspec watch http://127.0.0.1:8000 --export-port 9101

      afaspec watch http://127.0.0.1:8000 --until-drop || echo adapt it
    """
    import json
    from contextlib import ExitStack
    from dataclasses import asdict

    from rich.live import Live

    from afaspec.cli.console import console, note
    from afaspec.loop.metrics import WatchMetrics
    from afaspec.loop.watch import looks
    from serving.remote import connect

    server = connect(config.url, config.model)
    if server.k == 0:
        raise UserError("drafts nothing", where=config.url, hint="watch one that has a draft")
    try:
        port, cost = config.export_port, config.step_cost
        shown = WatchMetrics(port, step_cost=cost) if port else None
    except OSError as error:
        raise UserError(f"cannot listen on port {config.export_port}: {error}") from None
    note(f"{server.model} at {server.url}, k = {server.k}; Ctrl-C ends")
    with ExitStack() as stack:
        file = stack.enter_context(config.out.open("a", encoding="utf-8")) if config.out else None
        live = stack.enter_context(Live(console=console)) if console.is_terminal else None
        told = float("-inf")
        for look in looks(server, config.every, config.alpha):
            if file:
                file.write(json.dumps(asdict(look)) + "\n")
                file.flush()
            if shown:
                shown.show(look)
            if live:
                live.update(_table(look, cost))
            elif look.note or look.dropped or look.at - told >= PLAIN_SECONDS:
                told = look.at
                note(words(look, cost))
            if look.dropped and config.until_drop:
                note(f"Acceptance fell: {', '.join(look.dropped)}.")
                raise typer.Exit(DROPPED)


def words(look: Look, step_cost: float | None = None) -> str:
    """A look in one line."""
    parts = [_figures(look.all), f"{look.tokens_per_second:.0f} tokens/s"]
    if step_cost is not None and look.all.recent is not None:
        parts.append(f"some {look.all.recent / step_cost:.2f} times no drafts")
    if look.version is not None:
        parts.append(f"draft version {look.version}")
    fell = [tag for tag, figures in look.tags.items() if figures.dropped]
    if fell:
        parts.append(f"DROPPED for {', '.join(fell)}")
    return "  ".join([*parts, *([look.note] if look.note else [])])


def _figures(figures: Figures) -> str:
    length, before = (
        "-" if value is None else f"{value:.2f}" for value in (figures.recent, figures.baseline)
    )
    fell = ", DROPPED" if figures.dropped else ""
    return f"acceptance length {length} (baseline {before})  drift {figures.drift:.2f}{fell}"


def _table(look: Look, step_cost: float | None) -> Table:
    """The same for a terminal, with acceptance by position and by tag."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, title=words(look, step_cost), title_justify="left")
    for position, share in enumerate(look.per_position, 1):
        table.add_row(f"token {position}", f"{share:6.1%} {'█' * round(30 * share)}")
    for tag, figures in sorted(look.tags.items()):
        table.add_row(escape(tag), _figures(figures))
    return table
