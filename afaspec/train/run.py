"""The training loop: one arm, one store, one draft.

A killed run goes on exactly where it was: same weights, bit for bit on CPU.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from afaspec.adapters.afa import save_adapter
from afaspec.adapters.annealing import Annealer, annealed_layers
from afaspec.store.read import FeatureStore
from afaspec.train.arm import Setup, init_from_gradients, learning_rate, set_up
from afaspec.train.checks import check_fit, check_steps, check_stored
from afaspec.train.config import TrainConfig
from afaspec.train.loader import draw, split_sequences
from afaspec.train.metrics import Metrics, Report
from afaspec.train.objective import collate
from afaspec.train.state import Progress, load_state, save_state, trainable_state
from afaspec.train.step import training_step
from afaspec.versions import versions
from bench.prompts.trained_on import read_roots, write_roots
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import atomic_folder, read_json, remove_leftovers, write_json
from drafts.nn.interface import Draft
from drafts.target import TargetInfo


@dataclass
class Trained:
    """A finished run: where its result lies and how good it was on held-out sequences."""

    folder: Path
    result: Path
    best_step: int
    acceptance_length: float


def train(
    config: TrainConfig,
    store: FeatureStore,
    base: DraftInfo,
    target: TargetInfo,
    report: Report = lambda row: None,
    split: tuple[list[int], list[int]] | None = None,
) -> Trained:
    """Run (or go on with) the training that `config` describes, on what it names, opened.

    `report` gets each metrics row. `split` are the store's sequences to train on and to hold out,
    in place of a random division.
    """
    check_fit(store.manifest, store.folder, base, target)
    check_steps(base, config.draft_steps)
    train_ids, held_out = split or split_sequences(store, config)
    peak = config.peak_learning_rate(len(train_ids))

    accelerator = Accelerator()  # precision is ours: accelerate's is one for the whole process
    setup = set_up(config, base, target, accelerator.device)
    draft, optimizer = setup.draft, setup.optimizer
    check_stored(draft, base, lm_head=config.lm_head)
    write_or_check_config(config)  # nothing is written before all of the input has proved good
    roots = store.roots or []
    write_roots(config.out, read_roots(base.folder).union(roots[i] for i in train_ids if roots))
    progress = load_state(config.out / "checkpoint", draft, optimizer) or Progress()
    if progress.step == 0:
        started = time.perf_counter()
        init_from_gradients(setup.objective, config, store, train_ids)
        progress.seconds = time.perf_counter() - started
    annealer = Annealer(annealed_layers(draft), config.annealing, config.steps)
    annealer.load_state_dict(
        {"step": progress.step, "total_steps": config.steps, **progress.annealing}
    )
    annealer.attach(optimizer)
    # accelerate gets the module alone: it skips an optimizer's steps where another trainer stopped
    # between two.
    model = accelerator.prepare(setup.objective)

    def loss(micro: int) -> Tensor:
        chosen = draw(train_ids, config, micro)
        mine = chosen[accelerator.process_index :: accelerator.num_processes]
        found: Tensor = model(collate([store[i] for i in mine]).to(accelerator.device))
        return found

    metrics = Metrics(config, progress.step, report)
    while progress.step < config.steps:
        started = time.perf_counter()
        rate = learning_rate(config, peak, progress.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        beta = annealer.beta if annealer.layers else None
        first = progress.step * config.accumulation
        mean_loss, norm = training_step(
            accelerator,
            [partial(loss, first + i) for i in range(config.accumulation)],
            setup.parameters,
            [optimizer],
            clip=config.clip,
            bf16=config.bf16,
        )
        progress.step += 1
        progress.annealing = annealer.state_dict()
        progress.seconds += time.perf_counter() - started

        row = {"step": progress.step, "loss": mean_loss, "lr": rate, "grad_norm": norm}
        if beta is not None:
            row["beta"] = beta
        last = progress.step == config.steps
        if progress.step % config.eval_every == 0 or last:
            row |= evaluate(draft, store, held_out, config)
            if annealer.beta == 0:
                keep_best(row["acceptance_length"], setup, config, progress)
        metrics.add(row)
        if accelerator.is_main_process and (progress.step % config.checkpoint_every == 0 or last):
            save_state(config.out / "checkpoint", draft, optimizer, progress)
    metrics.close()
    return finish(config, store, base, progress, draft)


def evaluate(
    draft: Draft, store: FeatureStore, held_out: list[int], config: TrainConfig
) -> dict[str, Any]:
    """Offline acceptance on the held-out sequences."""
    held = (store[i] for i in held_out)
    measured = offline_acceptance(
        draft, held, config.draft_steps, batch=config.batch_size, amp=config.bf16
    )
    return {
        "acceptance_length": measured.acceptance_length,
        "per_position": [float(rate) for rate in measured.per_position],
    }


def keep_best(
    acceptance_length: float, setup: Setup, config: TrainConfig, progress: Progress
) -> None:
    """Save the result if it is the best mergeable one so far. A tie keeps the earlier."""
    if acceptance_length <= progress.best_acceptance_length:
        return
    progress.best_step, progress.best_acceptance_length = progress.step, acceptance_length
    with atomic_folder(result_folder(config)) as temporary:
        if config.arm == "full":
            save_file(trainable_state(setup.draft), temporary / "weights.safetensors")
        else:
            save_adapter(setup.wrapped, temporary, config.annealing, progress.step, config.steps)


def result_folder(config: TrainConfig) -> Path:
    """Where the run's result lies: `adapter/` for adapters, `weights/` for full fine-tuning."""
    return config.out / ("weights" if config.arm == "full" else "adapter")


def write_or_check_config(config: TrainConfig) -> None:
    """Record the configuration in the run's folder, or check that it is the one recorded there."""
    wanted = json.loads(config.model_dump_json())
    path = config.out / "config.json"
    remove_leftovers(result_folder(config))
    if not path.exists():
        write_json(path, wanted)
        return
    recorded = read_json(path)
    compared = wanted.keys() - {"out"}  # a run may be moved
    if changed := sorted(k for k in compared if recorded.get(k) != wanted[k]):
        raise UserError(
            f"belongs to a run with another {', '.join(changed)}",
            where=config.out,
            hint="choose another --out, or remove the folder to start anew",
        )


def finish(
    config: TrainConfig,
    store: FeatureStore,
    base: DraftInfo,
    progress: Progress,
    draft: Draft,
) -> Trained:
    """Write the run's manifest and describe its result."""
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    write_json(
        config.out / "manifest.json",
        {
            "made_by": "afaspec train",
            "arm": config.arm,
            "draft_sha256": base.sha256,
            "store": {"path": str(config.store), "target": dict(store.manifest.target)},
            "trainable_parameters": trained,
            "draft_parameters": sum(p.numel() for p in draft.parameters()),
            "best_step": progress.best_step,
            "held_out_acceptance_length": progress.best_acceptance_length,
            "seconds": round(progress.seconds, 2),
            "versions": versions(),
        },
    )
    return Trained(
        config.out, result_folder(config), progress.best_step, progress.best_acceptance_length
    )
