"""Capture: the target answers prompts, and its hidden states go to a feature store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.capture.plan import (
    Asked,
    CapturePlan,
    check_space,
    choose_batch_size,
    plan_capture,
    size,
)
from afaspec.capture.target_model import load_target
from afaspec.capture.turns import Turn, joined
from afaspec.store.manifest import NAME, Manifest, read_manifest
from afaspec.store.read import FeatureStore
from afaspec.store.write import StoreWriter, locked
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo

FORWARD_TOKENS = 8192  # through the model at a time when features are taken
FEATURES_SHARE = 0.1  # of a batch's time, roughly, for a bar that moves as they are taken too
# Where prompts lie and how they are read: `prompts_sha256` says whether they are the same.
NOT_COMPARED = ("prompts", "field", "skip_bad_rows")


@dataclass(frozen=True)
class CaptureProgress:
    """How far a capture is: sequences (in parts, within a batch) and tokens of this run."""

    done: float
    total: int
    tokens: int


def capture(
    config: CaptureConfig,
    target: TargetInfo,
    draft: DraftInfo | None = None,
    on_progress: Callable[[CaptureProgress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> FeatureStore:
    """Capture, go on with an interrupted capture, or return the store if it is complete.

    The layers that `draft` reads are kept, where it is given and `config` names none. `note` is
    told the size before it starts. The store's bytes depend on the configuration and the machine
    only, not on how often it was interrupted. Raises `UserError`.
    """
    say = note or (lambda _: None)
    plan = plan_capture(config, target, draft, say)
    with locked(config.out):
        manifest = _resume(plan)
        if manifest is not None and manifest.complete:
            store = FeatureStore.open(config.out, verify=True)
            say(f"{config.out} is already complete: {_describe(store)}")
            return store
        if manifest is None:
            manifest = plan.manifest(config.batch_size or choose_batch_size(plan))
        _announce(plan, manifest, say)
        model = load_target(plan.target.folder, plan.dtype, plan.device)
        _run(plan, manifest, model, on_progress or (lambda _: None))
    store = FeatureStore.open(config.out)
    say(f"{config.out}: {_describe(store)}")
    return store


def _run(
    plan: CapturePlan,
    manifest: Manifest,
    model: Any,
    on_progress: Callable[[CaptureProgress], None],
) -> None:
    from afaspec.capture.features import features

    writer = StoreWriter(plan.config.out, manifest, int(plan.config.shard_mib * (1 << 20)))
    writer.prepare()
    done, new_tokens, total = 0, 0, len(plan.prompts)
    train = plan.config.train_turns
    share = 1.0 if plan.config.use_responses else FEATURES_SHARE
    skip = FeatureStore(plan.config.out, manifest).prompts
    for number, batch in enumerate(plan.batches(manifest.settings["batch_size"])):
        if done < skip:  # shards end where batches end
            done += len(batch)
            continue

        def step(fraction: float, tokens: int, done: int = done, batch: list[int] = batch) -> None:
            nonlocal new_tokens
            new_tokens += tokens
            on_progress(CaptureProgress(done + fraction * len(batch), total, new_tokens))

        turns = _turns(plan, model, batch, number, lambda part, n: step((1 - share) * part, n))
        kept = [(i, one) for i, of in zip(batch, turns, strict=True) for one in joined(of, train)]
        sequences = [one.ids for _, one in kept]
        taken = []
        for one in features(model, sequences, plan.layer_ids, FORWARD_TOKENS):
            taken.append(one)
            step(1 - share + share * len(taken) / len(sequences), 0)
        writer.append(
            sequences,
            [one.mask for _, one in kept],
            [i for i, _ in kept],
            [hidden for hidden, _ in taken],
            [final for _, final in taken],
            [plan.prompts[i].prompt.root for i, _ in kept],
        )
        done += len(batch)
        on_progress(CaptureProgress(done, total, new_tokens))
    writer.finish()


def _turns(
    plan: CapturePlan,
    model: Any,
    batch: list[int],
    number: int,
    step: Callable[[float, int], None],
) -> list[list[Turn]]:
    """The turns of each of the batch's prompts, written by the target one after another."""
    from afaspec.capture.generate import generate

    config, prompts = plan.config, [plan.prompts[i] for i in batch]
    if config.use_responses:
        step(0.0, sum(len(turn.answer) for asked in prompts for turn in asked.turns))
        return [asked.turns for asked in prompts]
    most = max(len(asked.turns) for asked in prompts)
    turns: list[list[Turn]] = [[] for _ in prompts]
    for turn in range(most):
        rows = [row for row, asked in enumerate(prompts) if len(asked.turns) > turn]
        inputs = [_next_prompt(plan, prompts[row], turns[row]) for row in rows]
        seed = f"{config.seed}:{number}" + f":{turn}" * (turn > 0)

        def told(i: int, tokens: int, turn: int = turn) -> None:
            step((turn + (i + 1) / config.max_new_tokens) / most, tokens)

        answers = generate(
            model,
            inputs,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            end_ids=frozenset(plan.ends),
            seed=int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16),
            on_step=told,
        )
        for row, ids, answer in zip(rows, inputs, answers, strict=True):
            turns[row].append(Turn(ids, answer))
    return turns


def _next_prompt(plan: CapturePlan, asked: Asked, before: list[Turn]) -> list[int]:
    """Token ids of the turn after `before`, whose answers are carried forward as text."""
    dialogue = asked.prompt.dialogue
    if dialogue is None or not before:
        return asked.prompt.input_ids
    decode = plan.encoder.tokenizer.decode
    said = [decode(turn.answer, skip_special_tokens=True) for turn in before]
    return replace(plan.encoder, truncate=True).ask(dialogue, said).ids


def _resume(plan: CapturePlan) -> Manifest | None:
    """The manifest to go on with, None to start afresh. `UserError` if the store is another's."""
    out = plan.config.out
    if plan.config.overwrite:
        return None
    if not (out / NAME).exists():
        if any(out.iterdir()):
            raise UserError(
                "is a folder with other files in it, not a feature store",
                where=out,
                hint="choose a new or empty folder for --out",
            )
        return None
    found = read_manifest(out)
    _compare(found, plan)
    FeatureStore.open(out, allow_incomplete=True, verify=True)
    return found


def _compare(found: Manifest, plan: CapturePlan) -> None:
    batch_size = plan.config.batch_size or found.settings.get("batch_size", 0)
    wanted = plan.manifest(batch_size)
    pairs: list[tuple[str, Any, Any]] = [
        ("target", found.target["sha256"][:12], wanted.target["sha256"][:12]),
        ("layer_ids", list(found.layer_ids), list(wanted.layer_ids)),
        ("dtype", found.dtype, wanted.dtype),
    ]
    content = ("prompts_sha256", "prompts_count")  # last: another setting explains them better
    names = [name for name in wanted.settings if name not in (*NOT_COMPARED, *content)]
    for name in [*names, *content]:
        pairs.append((name, found.settings.get(name), wanted.settings[name]))
    for name, old, new in pairs:
        if old != new:
            what = "the prompts' content" if name in content else name
            raise UserError(
                f"this store was captured with other settings: {what} was {old}, now it is {new}",
                where=plan.config.out,
                hint="choose another --out, the old settings, or --overwrite to replace it",
            )


def _announce(plan: CapturePlan, manifest: Manifest, say: Callable[[str], None]) -> None:
    most = check_space(plan, sum(shard.bytes for shard in manifest.shards))
    going_on = f", {manifest.sequences:,} of them done" if manifest.shards else ""
    who = "their own responses" if plan.config.use_responses else "the target's responses"
    states = (
        f"layers {', '.join(map(str, plan.layer_ids))}" if plan.layer_ids else "no inner layers"
    )
    say(
        f"{len(plan.prompts):,} prompts with {who}{going_on}: at most {plan.most_tokens:,} tokens; "
        f"at most {size(most)} to write ({size(plan.token_bytes)} a token, {states})"
    )
    say(f"{plan.device}, {plan.dtype}, batches of {manifest.settings['batch_size']}")


def _describe(store: FeatureStore) -> str:
    manifest = store.manifest
    bytes_ = sum(shard.bytes for shard in manifest.shards)
    return (
        f"{manifest.sequences:,} sequences, {manifest.tokens:,} tokens "
        f"({manifest.response_tokens:,} of responses), {size(bytes_)}"
    )
