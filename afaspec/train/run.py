"""The training loop: one arm, one store, one draft, in one process or in several.

A killed run goes on exactly where it was: same weights, bit for bit on CPU. Several processes
(`torchrun`) divide each micro-batch among them and hold the same weights; the first one writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import save_file

from afaspec.adapters.afa import save_adapter
from afaspec.adapters.annealing import Annealer, annealed_layers
from afaspec.capture.readers.live import with_states
from afaspec.store.read import FeatureStore
from afaspec.store.write import locked
from afaspec.train.arm import GRADIENT_STEPS, Setup, init_from_gradients, learning_rate, set_up
from afaspec.train.checks import (
    check_fit,
    check_processes,
    check_same_step,
    check_steps,
    check_stored,
)
from afaspec.train.config import TrainConfig
from afaspec.train.held_out import WORDS, HeldOut, doubts
from afaspec.train.loader import Batches, ReadAhead, split_sequences
from afaspec.train.losses import compiled_loss
from afaspec.train.metrics import Metrics, Report
from afaspec.train.mix import Part, Split, parts_of
from afaspec.train.record import (
    MANIFEST,
    Record,
    Trained,
    Watched,
    read_trained,
    result_folder,
)
from afaspec.train.state import Progress, load_state, random_states, save_state, trainable_state
from afaspec.train.step import join_processes, training_step
from afaspec.versions import versions
from bench.prompts.trained_on import read_roots, write_roots
from drafts.checkpoint.info import DraftInfo
from drafts.errors import NotFiniteError, UserError
from drafts.files import atomic_folder, write_json
from drafts.nn.interface import Draft
from drafts.target.info import TargetInfo

Note = Callable[[str], object]
DATA = ("prompts", "self_prompts", "split", "eval_fraction", "limit")  # of a store's settings


def train(
    config: TrainConfig,
    store: FeatureStore,
    base: DraftInfo,
    target: TargetInfo,
    report: Report = lambda row: None,
    split: Split | None = None,
    note: Note = lambda text: None,
) -> Trained:
    """Run (or go on with) the training that `config` describes, on what it names, opened.

    `report` gets the metrics row of each step; `note` is told how good the base draft is. `split`
    are the store's sequences to train on and to hold out, in place of a random division; stores of
    `config.mix` are opened here, and divided at random. A run
    that is given more steps than before is prolonged: its learning rate follows the longer schedule
    from there on, and beta too once that has come down to it. All processes call this alike.
    Raises `UserError`, for the first loss or gradient that is not finite too.
    """
    accelerator = join_processes()
    config = config.on(accelerator.device)
    check_fit(store.manifest, store.folder, base, target)
    check_steps(base, config.draft_steps)
    split = split or split_sequences(store, config)
    parts = parts_of(config, store, split, base, target, note)
    record = Record.of(config, base, target, parts)
    record.check()
    if record.finished():
        return read_trained(config, store)

    check_processes(config.batch_size, accelerator.num_processes)
    stores = [part.store for part in parts]
    with with_states(stores, target, str(accelerator.device), config) as readable:
        parts = [replace(one, store=found) for one, found in zip(parts, readable, strict=True)]
        return _trained(config, parts, base, target, accelerator, record, report, note)


def _trained(
    config: TrainConfig,
    parts: list[Part],
    base: DraftInfo,
    target: TargetInfo,
    accelerator: Accelerator,
    record: Record,
    report: Report,
    note: Note,
) -> Trained:
    """The run of `train`, whose parts have states to read."""
    setup = set_up(config, base, target, accelerator.device)
    check_stored(setup.draft, base, lm_head=config.lm_head)
    held_out = [
        HeldOut(config, part.store, target, part.held_out, accelerator, part.name) for part in parts
    ]
    first = accelerator.is_main_process
    with locked(config.out, "afaspec train") if first else nullcontext():
        if first:
            record.write()  # not before all of the input has proved good
            learned = (part.roots(part.train).tolist() for part in parts if part.share)
            write_roots(config.out, read_roots(base.folder).union(*learned))
        accelerator.wait_for_everyone()
        progress = run(config, parts, held_out, setup, report, note)
        if first:
            write_manifest(config, parts, base, progress, held_out, setup)
        accelerator.wait_for_everyone()
    return Trained(
        config.out,
        result_folder(config),
        progress.best_step,
        held_out[0].measure,
        progress.best_length,
        progress.base_length,
        watched_of(held_out[1:], progress),
    )


def run(
    config: TrainConfig,
    parts: list[Part],
    held_out: Sequence[HeldOut],
    setup: Setup,
    report: Report,
    note: Note,
) -> Progress:
    """All steps from the checkpoint, or from the base draft, to the last.

    `held_out` are those of each part; the first alone decides which step is best.
    """
    draft, optimizer, accelerator = setup.draft, setup.optimizer, held_out[0].accelerator
    own, first = accelerator.process_index, accelerator.is_main_process
    batches = Batches(config, parts, setup.objective, accelerator)

    progress = load_state(config.out / "checkpoint", draft, optimizer, accelerator) or Progress()
    check_same_step(accelerator, progress.step, config.out)
    learned = len(parts[0].train), float(parts[0].share)
    progress.peak = progress.peak or config.peak_learning_rate(*learned)
    metrics = Metrics(config, progress.step, report) if first else None
    if progress.step == 0:
        found = measure_base(held_out, setup, progress, note)
        if metrics:
            metrics.add({"step": 0, **found})
        started = time.perf_counter()
        losses = chain.from_iterable(map(batches.losses, range(GRADIENT_STEPS)))
        init_from_gradients(accelerator, draft, config, losses)
        progress.seconds = time.perf_counter() - started
        if own:  # the first process draws as it would alone
            torch.manual_seed(config.seed + 1_000_003 * own)
    for parameter in draft.parameters() if accelerator.num_processes > 1 else ():
        broadcast(parameter.data)
    annealer = Annealer(annealed_layers(draft), config.annealing, config.steps)
    annealer.load_state_dict(
        {"step": progress.step, **progress.annealing, "total_steps": config.steps}
    )
    annealer.attach(optimizer)

    begun = progress.step
    with ReadAhead(batches, range(begun, config.steps)) as read:
        while progress.step < config.steps:
            started = time.perf_counter()
            rate = learning_rate(config, progress.peak, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            beta = annealer.beta if annealer.layers else None
            with stops_where_not_finite(batches, progress.step + 1, rate):
                loss, norm = training_step(
                    accelerator,
                    batches.losses(progress.step, read),
                    setup.parameters,
                    [optimizer],
                    clip=config.clip,
                    bf16=config.bf16,
                )
            progress.step += 1
            progress.annealing = annealer.state_dict()
            progress.seconds += time.perf_counter() - started
            failure = compiled_loss(config.loss).failure if config.compiled else None
            if failure and progress.step == begun + 1:
                note(
                    f"The loss is not compiled, and training slower ({failure}); see afaspec doctor"
                )

            row: dict[str, Any] = {
                "step": progress.step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
            }
            if beta is not None:
                row["beta"] = beta
            last = progress.step == config.steps
            if progress.step % config.eval_every == 0 or last:
                with stops_where_not_finite(batches, progress.step, rate):
                    row |= measure(held_out, draft)
                    if annealer.beta == 0:
                        lengths = [row[one.key] for one in held_out]
                        keep_best(lengths, setup, config, progress, write=first)
            if metrics:
                metrics.add(row)
            if progress.step % config.checkpoint_every == 0 or last:
                random = random_states(accelerator)
                if first:
                    save_state(config.out / "checkpoint", draft, optimizer, progress, random)
    if metrics:
        metrics.close()
    return progress


@contextmanager
def stops_where_not_finite(batches: Batches, step: int, rate: float) -> Iterator[None]:
    """Tell at which step a run broke. All processes look at all of its sequences and say the same.

    Nothing of a broken step is kept: the last result and checkpoint are those before it.
    """
    try:
        yield
    except NotFiniteError as error:
        batches.check(step - 1)
        config, instead = batches.config, "train anew in another --out with a lower --learning-rate"
        raise UserError(
            f"{error.problem} at step {step} of {config.steps}, where the learning rate is "
            f"{rate:.3g}",
            where=config.out,
            hint=f"{instead} or --precision fp32" if config.bf16 else instead,
        ) from None


def measure_base(
    held_out: Sequence[HeldOut], setup: Setup, progress: Progress, note: Note
) -> dict[str, Any]:
    """The base draft on the held-out sequences: what a result must be better than."""
    for layer in annealed_layers(setup.draft):
        layer.beta = 0.0  # as a LoRA, an adapter that was not trained leaves the draft as it is
    found = measure(held_out, setup.draft)
    progress.base_length, *progress.base_watched = (found[one.key] for one in held_out)
    progress.base_per_position = found["per_position"]
    note(f"Base draft: {WORDS[held_out[0].measure]} {progress.base_length:.3f}")
    if doubt := doubts(held_out[0].store, progress.base_per_position):
        note(doubt)
    for one, length in zip(held_out[1:], progress.base_watched, strict=True):
        note(f"{one.name}: {WORDS[one.measure]} {length:.3f}")
    return found


def measure(held_out: Sequence[HeldOut], draft: Draft) -> dict[str, Any]:
    """A metrics row of all of them. Looking at other stores than the run's leaves it as it is."""
    own, *watched = held_out
    found = own.evaluate(draft)
    with torch.random.fork_rng(enabled=bool(watched)):
        for one in watched:
            found |= one.evaluate(draft)
    return found


def watched_of(held_out: Sequence[HeldOut], progress: Progress) -> tuple[Watched, ...]:
    """What the best step did to the stores beside the run's own."""
    lengths = zip(held_out, progress.base_watched, progress.watched, strict=True)
    return tuple(Watched(one.name, one.measure, before, now) for one, before, now in lengths)


def keep_best(
    lengths: list[float], setup: Setup, config: TrainConfig, progress: Progress, *, write: bool
) -> None:
    """Save the result if it is the best mergeable one so far. A tie keeps the earlier.

    The first of `lengths` decides, the domain's; the others are kept with it.
    """
    length, *watched = lengths
    if length <= progress.best_length:
        return
    if not all(parameter.isfinite().all() for parameter in setup.parameters):
        raise NotFiniteError("a trained weight is NaN or infinite")
    progress.best_step, progress.best_length = progress.step, length
    progress.watched = watched
    if not write:
        return
    with atomic_folder(result_folder(config)) as temporary:
        if config.arm == "full":
            save_file(trainable_state(setup.draft), temporary / "weights.safetensors")
        else:
            save_adapter(setup.wrapped, temporary, config.annealing, progress.step, config.steps)


def write_manifest(
    config: TrainConfig,
    parts: list[Part],
    base: DraftInfo,
    progress: Progress,
    held_out: Sequence[HeldOut],
    setup: Setup,
) -> None:
    """Describe the finished run and its result."""
    kind, store = held_out[0].measure, parts[0].store
    mixed = zip(parts[1:], watched_of(held_out[1:], progress), strict=True)
    write_json(
        config.out / MANIFEST,
        {
            "made_by": "afaspec train",
            "arm": config.arm,
            "draft_sha256": base.sha256,
            "store": {
                "path": str(store.folder),
                "target": dict(store.manifest.target),
                "train_sequences": len(parts[0].train),
                "held_out_sequences": len(parts[0].held_out),
                **{name: store.manifest.settings.get(name) for name in DATA},
            },
            "mix": [
                {
                    "store": str(part.store.folder),
                    "share": float(part.share),
                    "train_sequences": len(part.train),
                    "held_out_sequences": len(part.held_out),
                    "watched": vars(watched),
                }
                for part, watched in mixed
            ],
            "trainable_parameters": sum(p.numel() for p in setup.parameters),
            "draft_parameters": sum(p.numel() for p in setup.draft.parameters()),
            "best_step": progress.best_step,
            f"held_out_{kind}_length": progress.best_length,
            f"base_{kind}_length": progress.base_length,
            "base_per_position": progress.base_per_position,
            "better_than_base": progress.best_length > progress.base_length,
            "processes": held_out[0].accelerator.num_processes,
            "seconds": round(progress.seconds, 2),
            "versions": versions(),
        },
    )
