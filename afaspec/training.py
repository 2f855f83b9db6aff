"""The training loop: one arm, one store, one draft.

The order of the data is a function of seed and step alone, so every arm sees the same batches and
a killed run goes on exactly where it was: same weights, bit for bit on CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from afaspec.adapted_target import resolve_optional
from afaspec.adapter import adapt, annealed_layers, save_adapter
from afaspec.annealing import Annealer, cycle_starts
from afaspec.folding import Folded, joined
from afaspec.objective import DraftObjective, collate
from afaspec.rank_allocation import allocate_ranks, weight_gradients
from afaspec.run_state import Progress, load_state, save_state, trainable_state
from afaspec.store import FeatureStore
from afaspec.train_checks import check_fit, check_steps, check_stored
from afaspec.train_config import TrainConfig
from bench.offline import offline_acceptance
from drafts.checkpoint import load_draft, read_draft_info
from drafts.draft import Draft
from drafts.errors import UserError
from drafts.files import atomic_folder, read_json, remove_leftovers, write_json
from drafts.target import load_lm_head, read_target

Report = Callable[[dict[str, Any]], None]
ALLOCATING_BATCHES = 4  # whose gradients decide on ranks


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
    target, info = read_target(target_folder), read_draft_info(config.draft)
    check_fit(store.manifest, config.store, info, target)
    check_steps(info, config.draft_steps)
    train_ids, held_out = sides or split_sequences(len(store), config)

    accelerator = Accelerator()  # precision is ours: accelerate's is one for the whole process
    torch.manual_seed(config.seed)
    draft = load_draft(config.draft, target_folder)
    ranks = allocated_ranks(draft, target_folder, config, store, train_ids)
    wrapped, trained = prepare_arm(draft, config, ranks)
    check_stored(draft, info, lm_head=config.lm_head)
    claim_folder(config)  # nothing is written before all of the input has proved good
    objective = make_objective(draft, target_folder, config)
    optimizer = torch.optim.AdamW(
        parameter_groups(draft, config), weight_decay=config.weight_decay, fused=True
    )
    folded = Folded()
    progress = load_state(config.out / "checkpoint", draft, optimizer, folded) or Progress()
    annealer = Annealer(annealed_layers(draft), config.annealing, config.steps, config.cycles)
    annealer.load_state_dict(
        {"step": progress.step, "total_steps": config.steps, **progress.annealing}
    )
    annealer.follow(optimizer)
    fold_at = set(cycle_starts(config.steps, config.cycles)) - {0}
    model, optimizer = accelerator.prepare(objective, optimizer)

    bf16 = config.precision == "bf16"
    metrics = Metrics(config, progress.step, report)
    while progress.step < config.steps:
        started = time.perf_counter()
        rate = learning_rate(config, progress.step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
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
        annealer.observe(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.annealing = annealer.state_dict()
        fresh = progress.step in fold_at
        if fresh:
            folded.fold(draft)
        if fresh or (config.reset_optimizer and beta and annealer.beta == 0):
            optimizer.state.clear()  # the moments are of another function
        progress.seconds += time.perf_counter() - started

        row: dict[str, Any] = {"step": progress.step, "loss": loss, "lr": rate}
        row["grad_norm"] = float(norm) if norm is not None else 0.0
        if beta is not None:
            row["beta"] = beta
        last = progress.step == config.steps
        if progress.step % config.eval_every == 0 or last:
            row |= evaluate(draft, store, held_out, config)
            if fresh or annealer.beta == 0:
                keep_best(row["acceptance_length"], wrapped, draft, config, progress, folded)
        metrics.add(row)
        if accelerator.is_main_process and (progress.step % config.checkpoint_every == 0 or last):
            save_state(config.out / "checkpoint", draft, optimizer, progress, folded)
    metrics.close()
    return finish(config, store, progress, draft)


def split_sequences(count: int, config: TrainConfig) -> tuple[list[int], list[int]]:
    """Sequence indices for training and the held-out ones, shuffled by the seed 0 for all arms."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(count * config.validation))
    if count - held < 1:
        raise UserError(
            f"holds {count} sequences, too few to hold some out",
            where=config.store,
            mend="capture more prompts",
        )
    return order[held:], order[: min(held, config.validation_limit)]


def draw(train_ids: list[int], config: TrainConfig, batch: int) -> list[int]:
    """The sequences of micro-batch number `batch`: epochs in seeded order, none skipped."""
    picked = []
    for i in range(batch * config.batch_size, (batch + 1) * config.batch_size):
        epoch, offset = divmod(i, len(train_ids))
        seed = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        picked.append(train_ids[torch.randperm(len(train_ids), generator=seed)[offset]])
    return picked


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to zero, at 0-based optimizer step `step`.

    A cycle warms up again, to where the cosine of the whole run stands by then; with
    `restart_rate` each cycle has a cosine of its own.
    """
    starts = cycle_starts(config.steps, config.cycles)
    begin = max(start for start in starts if start <= step)
    length = min((s for s in starts if s > begin), default=config.steps) - begin
    warm = round(config.warmup * length)
    rising = min((step - begin + 1) / warm, 1.0) if warm else 1.0
    if config.restart_rate or config.cycles == 1:
        done = (step - begin - warm) / max(length - warm, 1)
    else:
        first = round(config.warmup * (config.steps // config.cycles))
        done = (step - first) / max(config.steps - first, 1)
    return config.peak_learning_rate() * rising * 0.5 * (1 + math.cos(math.pi * max(done, 0.0)))


def adapted_modules(draft: nn.Module, config: TrainConfig) -> list[str]:
    """The last parts of the names of the linear layers that get adapters."""
    known = {
        name.rsplit(".", 1)[-1] for name, m in draft.named_modules() if isinstance(m, nn.Linear)
    }
    chosen = config.modules or sorted(known - {"lm_head"})
    modules = [*chosen, *(["lm_head"] if config.lm_head else [])]
    if unknown := sorted(set(modules) - known):
        raise UserError(
            f"modules names {', '.join(unknown)}, which the draft has not",
            mend=f"choose from {', '.join(sorted(known))}",
        )
    return modules


def allocated_ranks(
    draft: Draft, target: Path, config: TrainConfig, store: FeatureStore, train_ids: list[int]
) -> dict[str, int] | None:
    """Ranks by layer from the gradients of the first batches; None where all are alike."""
    if config.allocate == "uniform" or config.arm == "full":
        return None
    wanted = set(adapted_modules(draft, config))
    layers = {
        name: module
        for name, module in draft.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in wanted
    }
    objective = make_objective(draft, target, config)

    def loss(batch: int) -> torch.Tensor:
        bf16 = config.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = objective(collate([store[i] for i in draw(train_ids, config, batch)]))
        assert isinstance(found, torch.Tensor)
        return found

    batches = range(ALLOCATING_BATCHES)
    return allocate_ranks(
        weight_gradients(layers, [partial(loss, batch) for batch in batches]), config.rank
    )


def parameter_groups(draft: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """What trains, with each group's `ratio` to the learning rate: B's is LoRA+'s."""
    named = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
    of_b = [p for n, p in named if ".lora_B." in n]
    others = [p for n, p in named if ".lora_B." not in n]
    if config.b_ratio == 1 or not of_b:
        return [{"params": [p for _, p in named], "ratio": 1.0}]
    return [{"params": others, "ratio": 1.0}, {"params": of_b, "ratio": config.b_ratio}]


def prepare_arm(
    draft: nn.Module, config: TrainConfig, ranks: dict[str, int] | None = None
) -> tuple[Any, list[nn.Parameter]]:
    """Make exactly the arm's parameters trainable, in place; the PEFT model (or the draft).

    `ranks` are of single layers, by name; all others have the configuration's.
    """
    if config.arm == "full":
        frozen = {"embed_tokens"} if config.lm_head else {"embed_tokens", "lm_head"}
        for name, parameter in draft.named_parameters():
            parameter.requires_grad_(frozen.isdisjoint(name.split(".")))
        return draft, [p for p in draft.parameters() if p.requires_grad]
    from peft import LoraConfig

    alpha = config.alpha or 2 * config.rank
    wrapped = adapt(
        draft,
        LoraConfig(
            r=config.rank,
            lora_alpha=alpha,
            rank_pattern=ranks or {},
            alpha_pattern={n: alpha * r / config.rank for n, r in (ranks or {}).items()},
            use_rslora=config.rslora,
            lora_dropout=config.dropout,
            init_lora_weights=True if config.init == "default" else config.init,
            target_modules=adapted_modules(draft, config),
        ),
        config.activation if config.arm == "afa-lora" else None,
    )
    wrapped.peft_config["default"].base_model_name_or_path = str(config.draft)
    return wrapped, [p for p in draft.parameters() if p.requires_grad]


def make_objective(draft: Draft, target_folder: Path, config: TrainConfig) -> DraftObjective:
    """The loss that `config` asks for, against the target's own output layer."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return DraftObjective(
        draft,
        load_lm_head(target_folder).to(dtype),
        loss=config.loss,
        draft_steps=config.draft_steps,
        step_decay=config.step_decay,
        chunk=config.chunk,
        compiled=config.compiled,
    )


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
    folded: Folded,
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
            sum_of_all = joined(wrapped, folded, config.compress)
            plain = folded.cycles == 0 and config.compress is None
            save_adapter(
                wrapped,
                temporary,
                config.annealing,
                progress.step,
                config.steps,
                None if plain else sum_of_all,
            )


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
            mend="choose another --out, or remove the folder to start anew",
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
            "draft_sha256": read_draft_info(config.draft).sha256,
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
