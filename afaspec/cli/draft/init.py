"""`afaspec init`: write a fresh draft to train from scratch."""

from __future__ import annotations

from afaspec.checkpoints.config import InitConfig
from afaspec.cli.flags import configured


@configured(InitConfig, arguments=("family",))
def init(config: InitConfig) -> None:
    """Write a fresh draft of FAMILY for a target, to train with `afaspec train --arm full`.

    Its embedding and output layer begin as the target's, and so do the layers of EAGLE-3 and
    P-EAGLE drafts (--start). A reduced vocabulary (--vocab) makes drafting cheaper; it needs stores
    to count which tokens the target says. An mtp draft is the layer that the target brings itself
    to predict one token more, read out of it as it is.

    [bold]Examples[/]

      afaspec init eagle3 --target embedded --out runs/start

      afaspec init eagle3 --target embedded --store runs/store --vocab 4096 --out runs/start

      afaspec init eagle3 --target MODEL --store runs/a --store runs/b --vocab 8192 --out runs/start

      afaspec init medusa --target MODEL --heads 4 --out runs/heads

      afaspec init mtp --target MODEL --out runs/own-layer
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.checkpoints.init import init_checkpoint, next_commands
    from afaspec.cli.console import note, working
    from afaspec.store.read import FeatureStore
    from drafts.registry import FAMILIES

    with working("writing a draft"):
        target = open_target(config.target)
        stores = [FeatureStore.open(folder) for folder in config.store or []]
        info = init_checkpoint(config, target, stores, note)
    what = "the target's own layer" if FAMILIES[info.family].born_trained else "a fresh draft"
    note(f"{config.out}: {what} ({info.family}, {info.dtype}). Next:")
    for command in next_commands(config, info, str(config.target), stores):
        note(f"  {command}")
