"""`afaspec train`: adapt a draft on a feature store."""

from __future__ import annotations

from typing import Any

from afaspec.cli.console import console, note, progress
from afaspec.cli.flags import configured
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from drafts.checkpoint.info import DraftInfo
from drafts.target.info import TargetInfo


@configured(TrainConfig)
def train(config: TrainConfig) -> None:
    """Train a draft adapter: LoRA, AFA-LoRA, or all weights.

    Killed runs go on where they were when the same command is given again; with more --steps a run
    is prolonged. Started by torchrun, several processes divide each batch among them.

    [bold]Examples[/]

      afaspec train --store runs/store --draft DRAFT --out runs/adapted

      afaspec train --store runs/store --draft DRAFT --out runs/afa --arm afa-lora

      afaspec train --config train.yaml --learning-rate 1e-3 --rank 8

      afaspec train --store runs/store --draft DRAFT --out runs/kept --mix runs/general=0.2

      torchrun --nproc-per-node 2 -m afaspec train --store runs/store --draft DRAFT --out runs/two
    """
    from torch import distributed

    from afaspec.pairs.names import pinned
    from afaspec.train.held_out import WORDS
    from afaspec.train.run import train as run
    from drafts.files import disk_errors
    from serving.speculation import usual_k

    # A run goes on with the draft and target that it began with, whatever the hub has by then.
    named = {"draft": pinned(config.draft), "target": config.target and pinned(config.target)}
    config = config.model_copy(update=named)
    inputs = open_inputs(config)
    if "draft_steps" not in config.model_fields_set:  # as it is served
        config = config.model_copy(update={"draft_steps": usual_k(inputs[1])})
    with progress() as bar, disk_errors(config.out):
        task = bar.add_task(config.arm, total=config.steps, unit="step")

        def report(row: dict[str, Any]) -> None:
            beta = f" beta {row['beta']:.2f}" if "beta" in row else ""
            bar.update(
                task,
                completed=row["step"],
                description=f"{config.arm} loss {row['loss']:.3f}{beta}",
            )
            for measure, words in WORDS.items():
                if f"{measure}_length" in row:
                    watched = "".join(
                        f"  {key.partition('/')[0]} {value:.3f}"
                        for key, value in row.items()
                        if key.endswith(("/acceptance_length", "/agreement_length"))
                    )
                    bar.console.print(
                        f"step {row['step']:>5}  loss {row['loss']:.4f}{beta}  "
                        f"{words} {row[f'{measure}_length']:.3f}{watched}"
                    )

        trained = run(config, *inputs, report, note=note)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    words = f"{WORDS[trained.measure]} {trained.length:.3f}"
    if trained.before:
        console.print(f"{config.out} is finished already: {words} at step {trained.best_step}.")
        for watched in trained.watched:
            console.print(watched.words, highlight=False)
        return
    console.print(f"Best: step {trained.best_step}, {words}, in {trained.result}")
    for watched in trained.watched:
        console.print(watched.words, highlight=False)
    if trained.length <= trained.base_length:
        note(
            f"It is not better than the base draft, whose is {trained.base_length:.3f}: train "
            "longer, on more sequences, or at another --learning-rate before merging it."
        )
        return
    console.print(f"Next: afaspec merge {trained.folder} --out {trained.folder}/merged")


def open_inputs(config: TrainConfig) -> tuple[FeatureStore, DraftInfo, TargetInfo]:
    """What `config` names: the store, the base draft, and the target, by default the store's."""
    from afaspec.capture.adapted_target import open_target, open_target_if_given
    from afaspec.pairs.names import open_draft

    store = FeatureStore.open(config.store)
    given = open_target_if_given(config.target, config.target_adapter, note)
    target = given or open_target(store.manifest.target["path"])
    return store, open_draft(config.draft), target
