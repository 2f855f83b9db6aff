"""`afaspec train`: adapt a draft on a feature store."""

from __future__ import annotations

from typing import Any

from afaspec.cli.console import console, note, progress
from afaspec.cli.flags import configured
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from drafts.checkpoint.info import DraftInfo
from drafts.target import TargetInfo


@configured(TrainConfig)
def train(config: TrainConfig) -> None:
    """Train a draft adapter: LoRA, AFA-LoRA, or all weights.

    Killed runs go on where they were when the same command is given again.

    [bold]Examples[/]

      afaspec train --store runs/store --draft DRAFT --out runs/adapted

      afaspec train --store runs/store --draft DRAFT --out runs/afa --arm afa-lora

      afaspec train --config train.yaml --learning-rate 1e-3 --rank 8
    """
    from afaspec.embedded.names import pinned
    from afaspec.train.run import train as run
    from afaspec.train.run import write_or_check_config
    from drafts.files import disk_errors, read_json

    # A run goes on with the draft and target that it began with, whatever the hub has by then.
    named = {"draft": pinned(config.draft), "target": config.target and pinned(config.target)}
    config = config.model_copy(update=named)
    done = config.out / "manifest.json"
    if done.exists():
        write_or_check_config(config)
        summary = read_json(done)
        console.print(
            f"{config.out} is finished already: held-out acceptance length "
            f"{summary['held_out_acceptance_length']:.3f} at step {summary['best_step']}."
        )
        return
    with progress() as bar, disk_errors(config.out):
        task = bar.add_task(config.arm, total=config.steps, unit="step")

        def report(row: dict[str, Any]) -> None:
            beta = f" beta {row['beta']:.2f}" if "beta" in row else ""
            bar.update(
                task,
                completed=row["step"],
                description=f"{config.arm} loss {row['loss']:.3f}{beta}",
            )
            if "acceptance_length" in row:
                bar.console.print(
                    f"step {row['step']:>5}  loss {row['loss']:.4f}{beta}  "
                    f"held-out acceptance length {row['acceptance_length']:.3f}"
                )

        trained = run(config, *open_inputs(config), report)
    console.print(
        f"Best: step {trained.best_step}, held-out acceptance length "
        f"{trained.acceptance_length:.3f}, in {trained.result}"
    )
    console.print(f"Next: afaspec merge {trained.folder} --out {trained.folder}/merged")


def open_inputs(config: TrainConfig) -> tuple[FeatureStore, DraftInfo, TargetInfo]:
    """What `config` names: the store, the base draft, and the target, by default the store's."""
    from afaspec.capture.adapted_target import open_target, open_target_if_given
    from afaspec.embedded.names import open_draft

    store = FeatureStore.open(config.store)
    given = open_target_if_given(config.target, config.target_adapter, note)
    target = given or open_target(store.manifest.target["path"])
    return store, open_draft(config.draft), target
