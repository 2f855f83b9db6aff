"""The training loop: one arm, one store, one draft.

A killed run goes on exactly where it was: same weights, bit for bit on CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from afaspec.adapters.afa import save_adapter
from afaspec.adapters.annealing import Annealer, annealed_layers
from afaspec.capture.adapted_target import resolve_optional
from afaspec.store.read import FeatureStore
from afaspec.train.arm import init_from_gradients, learning_rate, make_objective, prepare_arm
from afaspec.train.checks import check_fit, check_steps, check_stored
from afaspec.train.config import TrainConfig
from afaspec.train.loader import draw, split_sequences
from afaspec.train.objective import collate
from afaspec.train.state import Progress, load_state, save_state, trainable_state
from bench.stats.offline import offline_acceptance
from drafts.errors import UserError
from drafts.files import atomic_folder, read_json, remove_leftovers, write_json
from drafts.registry import load_draft, read_draft
from drafts.target import read_target

Report = Callable[[dict[str, Any]], None]


@dataclass
class Trained:
    """A finished run: where its result lies and how good it was on held-out sequences."""

    folder: Path
    result: Path
    best_step: int
    acceptance_length: float


def train(
    config: TrainConfig,
    report: Report = lambda row: None,
    note: Callable[[str], None] = lambda text: None,
    sides: tuple[list[int], list[int]] | None = None,
) -> Trained:
    """Run (or go on with) the training that `config` describes.

    `report` gets each metrics row; `note` is told where a target merged with its adapter lies.
    `sides` are the store's sequences to train on and to hold out, in place of a random division.
    """
    store = FeatureStore.open(config.store)
    given = resolve_optional(config.target, config.target_adapter, note)
    target_folder = given or Path(store.manifest.target["path"])
    target, info = read_target(target_folder), read_draft(config.draft)
    check_fit(store.manifest, config.store, info, target)
    check_steps(info, config.draft_steps)
    train_ids, held_out = sides or split_sequences(len(store), config)
    peak = config.peak_learning_rate(len(train_ids))

    accelerator = Accelerator()  # precision is ours: accelerate's is one for the whole process
    torch.manual_seed(config.seed)
    draft = load_draft(info, target)
    wrapped, trained = prepare_arm(draft, config)
    check_stored(draft, info, lm_head=config.lm_head)
    claim_folder(config)  # nothing is written before all of the input has proved good
    # On its device before the optimizer, whose state lies where its parameters do. accelerate gets
    # the module alone: it skips an optimizer's steps where another trainer stopped between two.
    objective = make_objective(draft, target, config).to(accelerator.device)
    optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay, fused=True)
    progress = load_state(config.out / "checkpoint", draft, optimizer) or Progress()
    if progress.step == 0:
        started = time.perf_counter()
        init_from_gradients(objective, config, store, train_ids)
        progress.seconds = time.perf_counter() - started
    annealer = Annealer(annealed_layers(draft), config.annealing, config.steps)
    annealer.load_state_dict(
        {"step": progress.step, "total_steps": config.steps, **progress.annealing}
    )
    annealer.follow(optimizer)
    model = accelerator.prepare(objective)

    bf16 = config.precision == "bf16"
    metrics = Metrics(config, progress.step, report)
    while progress.step < config.steps:
        started = time.perf_counter()
        rate = learning_rate(config, peak, progress.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        beta = annealer.beta if annealer.layers else None
        loss = 0.0
        for micro in range(config.accumulation):
            chosen = draw(train_ids, config, progress.step * config.accumulation + micro)
            mine = chosen[accelerator.process_index :: accelerator.num_processes]
            batch = collate([store[i] for i in mine]).to(accelerator.device)
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
                part = model(batch) / config.accumulation
            accelerator.backward(part)
            loss += float(part.detach())
        norm = accelerator.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.annealing = annealer.state_dict()
        progress.seconds += time.perf_counter() - started

        row: dict[str, Any] = {"step": progress.step, "loss": loss, "lr": rate}
        row["grad_norm"] = float(norm) if norm is not None else 0.0
        if beta is not None:
            row["beta"] = beta
        last = progress.step == config.steps
        if progress.step % config.eval_every == 0 or last:
            row |= evaluate(draft, store, held_out, config)
            if annealer.beta == 0:
                keep_best(row["acceptance_length"], wrapped, draft, config, progress)
        metrics.add(row)
        if accelerator.is_main_process and (progress.step % config.checkpoint_every == 0 or last):
            save_state(config.out / "checkpoint", draft, optimizer, progress)
    metrics.close()
    return finish(config, store, progress, draft)


def evaluate(
    draft: Any, store: FeatureStore, held_out: list[int], config: TrainConfig
) -> dict[str, Any]:
    """Offline acceptance on the held-out sequences."""
    was_training = draft.training
    draft.eval()
    measured = offline_acceptance(
        draft,
        (store[i] for i in held_out),
        config.draft_steps,
        batch=config.batch_size,
        amp=config.precision == "bf16",
    )
    draft.train(was_training)
    return {
        "acceptance_length": measured.acceptance_length,
        "per_position": [float(rate) for rate in measured.per_position],
    }


def keep_best(
    acceptance_length: float,
    wrapped: Any,
    draft: Any,
    config: TrainConfig,
    progress: Progress,
) -> None:
    """Save the result if it is the best mergeable one so far. A tie keeps the earlier."""
    if acceptance_length <= progress.best_acceptance_length:
        return
    progress.best_step, progress.best_acceptance_length = progress.step, acceptance_length
    with atomic_folder(result_folder(config)) as temporary:
        if config.arm == "full":
            from safetensors.torch import save_file

            save_file(trainable_state(draft), temporary / "weights.safetensors")
        else:
            save_adapter(wrapped, temporary, config.annealing, progress.step, config.steps)


def result_folder(config: TrainConfig) -> Path:
    """Where the run's result lies: `adapter/` for adapters, `weights/` for full fine-tuning."""
    return config.out / ("weights" if config.arm == "full" else "adapter")


def claim_folder(config: TrainConfig) -> None:
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


class Metrics:
    """`metrics.jsonl` and TensorBoard events; rows after the resumed checkpoint are dropped."""

    def __init__(self, config: TrainConfig, step: int, report: Report):
        self.path, self.report = config.out / "metrics.jsonl", report
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        whole = [row for row in rows if row.endswith("}")]
        kept = [row for row in whole if json.loads(row)["step"] <= step]
        self.path.write_text("".join(row + "\n" for row in kept))
        self.file = self.path.open("a", buffering=1)
        self.writer: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1)

    def add(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        if self.writer:
            for key, value in row.items():
                if key != "step" and isinstance(value, float):
                    self.writer.add_scalar(key, value, row["step"])
        self.report(row)

    def close(self) -> None:
        self.file.close()
        if self.writer:
            self.writer.close()


def finish(
    config: TrainConfig, store: FeatureStore, progress: Progress, draft: nn.Module
) -> Trained:
    """Write the run's manifest and describe its result."""
    from afaspec.versions import versions

    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    write_json(
        config.out / "manifest.json",
        {
            "made_by": "afaspec train",
            "arm": config.arm,
            "draft_sha256": read_draft(config.draft).sha256,
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
