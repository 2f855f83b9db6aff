"""`afaspec build-embedded`: make the shipped pair again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def build_embedded(
    work: Annotated[Path, typer.Option(help="Folder for all stages' results.")] = Path(
        "runs/embedded"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the packed pair (default: the package's own).")
    ] = None,
    extra: Annotated[
        Path | None, typer.Option(help="Folder with further training texts, for the target.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time for training the target (default: 70).")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens for training the target, in place of a time.")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="YAML file with all settings; flags win.")
    ] = None,
) -> None:
    """Train the embedded target and its EAGLE-3 draft from scratch and pack them.

    Takes about two hours on two cores; a killed build goes on where it was. The log, with the loss
    curves, stays in --work.

    [bold]Examples[/]

      afaspec build-embedded --work runs/embedded --out runs/pair --minutes 70

      afaspec build-embedded --tokens 300000000 --extra texts/   # on a GPU
    """
    from afaspec.cli.console import progress
    from afaspec.config import load_config
    from afaspec.pretrain.build import BuildConfig
    from afaspec.pretrain.build import build_embedded as build
    from bench.report.console import stage_bars

    flags = {"work": work, "out": out, "extra": extra, "target.minutes": minutes}
    config = load_config(BuildConfig, config_file, flags | {"target.tokens": tokens})
    with progress() as bars:
        say = lambda text: bars.console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
        build(config, say, stage_bars(bars))
