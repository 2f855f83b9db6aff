"""`afaspec init`: write a random draft to train from scratch."""

from __future__ import annotations

from afaspec.checkpoints.config import StartConfig
from afaspec.cli.flags import configured


@configured(StartConfig, arguments=("family",))
def init(config: StartConfig) -> None:
    """Write a random draft of FAMILY for a target, to train with `afaspec train --arm full`.

    Its embedding and output layer start as the target's. A reduced vocabulary (--vocab) makes
    drafting cheaper; it needs a store, to count which tokens the target says.

    [bold]Examples[/]

      afaspec init eagle3 --target embedded --out runs/start

      afaspec init eagle3 --target embedded --store runs/store --vocab 4096 --out runs/start

      afaspec init medusa --target MODEL --heads 4 --out runs/heads
    """
    from afaspec.checkpoints.init import next_commands, start_draft
    from afaspec.cli.console import note
    from afaspec.embedded.names import resolve_model

    target = resolve_model(str(config.target))
    info = start_draft(config.model_copy(update={"target": target}), note)
    note(f"{config.out}: a random draft ({info.family}, {info.dtype}). Next:")
    for command in next_commands(config, info, str(config.target)):
        note(f"  {command}")
