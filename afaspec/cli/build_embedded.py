"""`afaspec build-embedded`: make the shipped pair again."""

from __future__ import annotations

from afaspec.cli.flags import configured
from afaspec.pretrain.config import BuildConfig


@configured(BuildConfig, names={"target.minutes": "--minutes", "target.tokens": "--tokens"})
def build_embedded(config: BuildConfig) -> None:
    """Train the embedded target and its EAGLE-3 draft from scratch and pack them.

    Takes about two hours on two cores; a killed build goes on where it was. The log, with the loss
    curves, stays in --work.

    [bold]Examples[/]

      afaspec build-embedded --work runs/embedded --out runs/pair --minutes 70

      afaspec build-embedded --tokens 300000000 --extra texts/   # on a GPU
    """
    from afaspec.cli.console import note, progress
    from afaspec.pretrain.build import build_embedded as build
    from bench.report.console import stage_bars

    with progress() as bars:
        build(config, note, stage_bars(bars))
