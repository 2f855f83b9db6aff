"""`afaspec inspect`: what a draft is, what serves it, and whether it fits a target."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from pydantic import Field
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from afaspec.cli.flags import configured
from bench.records.settings import Settings

if TYPE_CHECKING:
    from afaspec.checkpoints.inspect import Inspection


class InspectConfig(Settings):
    """What is looked at."""

    draft: str = Field(
        description="the draft's folder or hub id, `smollm2-draft` or `embedded-draft`"
    )
    target: str | None = Field(
        None, description="a target that the draft should fit, `smollm2` or `embedded`"
    )
    as_json: bool = Field(False, validation_alias="json", description="print JSON on stdout")


@configured(InspectConfig, arguments=("draft",))
def inspect(config: InspectConfig) -> None:
    """Say what DRAFT is: family, sizes, vocabulary, what it reads of the target, how vLLM takes it.

    With --target, also whether the two fit. Exit code 2 when they do not, or when the draft is
    damaged.

    [bold]Examples[/]

      afaspec inspect embedded-draft

      afaspec inspect runs/afa-merged --target models/Llama-3.1-8B-Instruct

      afaspec inspect models/EAGLE3-LLaMA3.1-Instruct-8B --json
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.checkpoints.inspect import inspect_draft
    from afaspec.cli.console import working
    from afaspec.pairs.names import open_draft

    with working("reading"):
        target = open_target(config.target) if config.target else None
        found = inspect_draft(open_draft(config.draft), target)
    if config.as_json:
        typer.echo(json.dumps({**asdict(found), "fits": found.fits}, indent=2))
    else:
        print_tables(found)
    if not found.fits:
        raise typer.Exit(2)


def print_tables(found: Inspection) -> None:
    from serving.compatibility import table

    rows = Table(title=escape(found.folder), title_justify="left", show_header=False)
    for name, value in facts(found).items():
        rows.add_row(name, escape(value))
    console = Console()
    console.print(rows)
    console.print("Serve it in vLLM with")
    config = json.dumps(found.speculative_config)
    console.print(
        f"  --speculative-config '{config}'", soft_wrap=True, highlight=False, markup=False
    )
    for warning in found.warnings:
        console.print(f"Warning: {escape(warning)}.", soft_wrap=True)
    if found.checks is not None:
        console.print(table(found.checks))


def facts(found: Inspection) -> dict[str, str]:
    """What the table says, row by row."""
    reduced = found.draft_vocab_size != found.vocab_size
    share = found.draft_vocab_size / found.vocab_size
    vocabulary = (
        f"{found.draft_vocab_size:,} of the target's {found.vocab_size:,} ids ({share:.0%})"
    )
    hidden = f"{found.hidden_size}"
    if found.target_hidden_size != found.hidden_size:
        hidden += f" (the target's {found.target_hidden_size})"
    shared = [name.removesuffix(".weight") for name in found.shared]
    return {
        "family": found.title,
        "layout": found.layout,
        "method in vLLM": found.method,
        "largest k": "any" if found.largest_k is None else str(found.largest_k),
        "layers": str(found.layers),
        "hidden size": hidden,
        "vocabulary": vocabulary if reduced else f"full, {found.vocab_size:,} ids",
        **({"vocabulary map": found.vocabulary_map} if found.vocabulary_map else {}),
        "reads hidden states": found.hidden_states,
        "shares with the target": ", ".join(shared) or "nothing",
        **({"positions": f"{found.positions:,}"} if found.positions else {}),
        "weights": f"{found.parameters:,} parameters in {found.dtype}, {found.bytes / 1e6:,.1f} MB",
        "sha256": found.sha256[:16],
        **made(found),
    }


def made(found: Inspection) -> dict[str, str]:
    """The rows of a merged draft: how its adapter was annealed, and how exactly it was merged."""
    if not found.made or "parity" not in found.made:
        return {}
    annealing, parity = found.made.get("annealing") or {}, found.made["parity"]
    activation, beta = annealing.get("activation"), annealing.get("beta")
    return {
        "merged from": f"AFA-LoRA ({activation}, last beta {beta:g})"
        if activation
        else "LoRA or full",
        "parity": f"{parity['float32']:.1e} relative in float32, {parity['stored']:.1e} as stored",
    }
