"""`afaspec init`: write a random draft to train from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    family: Annotated[
        str,
        typer.Argument(
            help="eagle3, eagle, medusa, peagle, dflash or draft_model.", show_default=False
        ),
    ],
    target: Annotated[str, typer.Option(help="The target's folder, or `embedded`.")],
    out: Annotated[Path, typer.Option(help="New folder for the draft.")],
    layers: Annotated[
        int | None, typer.Option(help="Decoder layers (Medusa: per head).", min=1)
    ] = None,
    layer_ids: Annotated[
        str | None, typer.Option(help="The target's hidden states to read, such as 2,6,9.")
    ] = None,
    vocab: Annotated[
        int | None,
        typer.Option(help="Keep this many tokens, the most frequent in the store's responses."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Feature store to count tokens in and take layers from.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Tokens that a Medusa or DFlash draft is made for.", min=1)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32 (default: the target's).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Write a random draft of FAMILY for a target, to train with `afaspec train --arm full`.

    Its embedding and output layer start as the target's. A reduced vocabulary (--vocab) makes
    drafting cheaper; it needs a store, to count which tokens the target says.

    [bold]Examples[/]

      afaspec init eagle3 --target embedded --out runs/start

      afaspec init eagle3 --target embedded --store runs/store --vocab 4096 --out runs/start

      afaspec init medusa --target MODEL --heads 4 --out runs/heads
    """
    from afaspec.checkpoints.init import InitConfig, init_checkpoint, next_commands
    from afaspec.cli.console import console
    from afaspec.embedded.names import resolve_model

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    config = InitConfig(
        family=family,
        target=resolve_model(target),
        out=out,
        layers=layers,
        layer_ids=layer_ids,
        vocab=vocab,
        store=store,
        heads=heads,
        dtype=dtype,
        seed=seed,
    )
    info = init_checkpoint(config, say)
    say(f"{out}: a random draft ({info.family}, {info.dtype}). Next:")
    for command in next_commands(config, info, target):
        say(f"  {command}")
