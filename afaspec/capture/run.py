"""Capture: the target answers prompts, and its hidden states go to a feature store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from afaspec.capture.answers import JOURNAL as ANSWERS
from afaspec.capture.answers import write_ahead, write_turns
from afaspec.capture.config import CaptureConfig
from afaspec.capture.journal import AGAIN
from afaspec.capture.memory import check_space, choose_batch_size, size
from afaspec.capture.plan import (
    GROWN,
    CapturePlan,
    Setup,
    hash_of,
    plan_capture,
    settle,
)
from afaspec.capture.readers.choose import open_reader
from afaspec.capture.readers.protocol import Reader
from afaspec.capture.self_prompts import FILES, longest_sequence, write_self_prompts
from afaspec.capture.turns import Turn, joined
from afaspec.capture.writers.choose import open_writer
from afaspec.capture.writers.protocol import OnStep, Writer
from afaspec.capture.writers.transformers_model import TransformersWriter
from afaspec.store.manifest import NAME, Manifest, read_manifest
from afaspec.store.read import FeatureStore
from afaspec.store.write import StoreWriter, locked
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from afaspec.capture.features import Keeper, States

FEATURES_SHARE = 0.1  # of a batch's time, roughly, where they are taken after the answers
# What is another in a store that has grown.
GROWING = ("limit", "prompts_count", "prompts_sha256", "self_prompts")
# Where prompts lie and how they are read: `prompts_sha256` says whether they are the same.
NOT_COMPARED = ("prompts", "field", "skip_bad_rows")


Stage = Literal["prompts", "answers", "capture"]
# Of a batch and its number: the turns of each prompt, and the states of prompt and answer where
# they were kept as that was written.
TurnsOf = Callable[[list[int], int, OnStep], tuple[list[list[Turn]], "list[States] | None"]]


@dataclass(frozen=True)
class CaptureProgress:
    """How far a stage is: prompts (in parts, within a batch) and tokens of this run.

    Prompts are written where the target writes them itself, answers where vLLM writes them ahead.
    """

    done: float
    total: int
    tokens: int
    stage: Stage = "capture"


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
    tell = on_progress or (lambda _: None)
    setup = settle(config, target, draft)
    with closing(open_writer(setup)) as writer:
        if config.self_prompts is not None:
            with locked(config.out):
                write_prompts(setup, writer, say, tell)
        return capture_planned(plan_capture(setup, say), writer, tell, say)


def write_prompts(
    setup: Setup,
    writer: Writer,
    say: Callable[[str], None],
    on_progress: Callable[[CaptureProgress], None],
) -> None:
    """Let the target write the prompts, where it is to."""
    if (count := setup.config.self_prompts) is not None:
        write_self_prompts(setup, writer, say, _stage(on_progress, "prompts", count))


def capture_planned(
    plan: CapturePlan,
    writer: Writer,
    on_progress: Callable[[CaptureProgress], None],
    say: Callable[[str], None],
) -> FeatureStore:
    """The capture that is planned, by a writer that stays open."""
    config = plan.config
    with locked(config.out):
        manifest = _resume(plan)
        if manifest is not None and manifest.complete:
            store = FeatureStore.open(config.out, verify=True)
            say(f"{config.out} is already complete: {_describe(store)}")
            return store
        if manifest is None:
            manifest = plan.manifest(config.batch_size or choose_batch_size(plan))
        announce(plan, manifest, say)
        begin = max(_grown(manifest), default=0)
        reader, turns_of, share = _written(plan, writer, on_progress, begin)
        shards = StoreWriter(config.out, manifest, int(config.shard_mib * (1 << 20)))
        shards.prepare()
        with closing(reader) if reader else nullcontext():
            _run(plan, shards, reader, turns_of, share, on_progress)
        (config.out / ANSWERS).unlink(missing_ok=True)
    store = FeatureStore.open(config.out)
    say(f"{config.out}: {_describe(store)}")
    return store


def _stage(
    on_progress: Callable[[CaptureProgress], None], stage: Stage, total: int
) -> Callable[[float, int], None]:
    return lambda done, tokens: on_progress(CaptureProgress(done, total, tokens, stage))


def _written(
    plan: CapturePlan,
    writer: Writer,
    on_progress: Callable[[CaptureProgress], None],
    begin: int,
) -> tuple[Reader | None, TurnsOf, float]:
    """What gives the features (None: none are kept), what gives the turns of a batch, and the share
    of its time that taking features has where they were not kept.

    Prompts before number `begin` are in the store.
    """
    config = plan.config
    texts = config.features == "none"

    def reader(model: Any = None) -> Reader | None:
        return None if texts else open_reader(plan.read_with, plan.to_read, model)

    longest = max(plan.longest(asked) for asked in plan.prompts)
    if config.use_responses:

        def recorded(batch: list[int], number: int, step: OnStep) -> tuple[list[list[Turn]], None]:
            turns = [plan.prompts[i].turns for i in batch]
            step(0.0, sum(len(turn.answer) for of in turns for turn in of))
            return turns, None

        return reader(), recorded, 1.0
    if isinstance(writer, TransformersWriter):
        from afaspec.capture.features import keeping

        def write(
            batch: list[int], number: int, step: OnStep
        ) -> tuple[list[list[Turn]], list[States] | None]:
            alone = not texts and all(len(plan.prompts[i].turns) == 1 for i in batch)
            portion = 1.0 if alone else 1 - FEATURES_SHARE
            kept: AbstractContextManager[Keeper | None] = nullcontext()
            if alone:
                kept = keeping(writer.model, plan.layer_ids, len(batch))
            with kept as keeper:
                turns = write_turns(
                    plan,
                    partial(writer.write, keeper=keeper),
                    batch,
                    f"{plan.seed}:{number}",
                    longest,
                    lambda part, tokens: step(portion * part, tokens),
                )
            return turns, list(keeper.kept()) if keeper else None

        return reader(writer.model), write, FEATURES_SHARE
    if config.self_prompts is not None:  # as for those prompts, so that one engine serves both
        longest = longest_sequence(plan)
    told = _stage(on_progress, "answers", len(plan.prompts))
    written = write_ahead(plan, writer, longest, told, begin)
    writer.close()  # its memory is needed

    def ready(batch: list[int], number: int, step: OnStep) -> tuple[list[list[Turn]], None]:
        turns = [written[i - begin] for i in batch]
        step(0.0, sum(len(turn.answer) for of in turns for turn in of))
        return turns, None

    return reader(), ready, 1.0


def _run(
    plan: CapturePlan,
    shards: StoreWriter,
    reader: Reader | None,
    turns_of: TurnsOf,
    share: float,
    on_progress: Callable[[CaptureProgress], None],
) -> None:
    done, new_tokens, total = 0, 0, len(plan.prompts)
    train = plan.config.train_turns
    skip = FeatureStore(plan.config.out, shards.manifest).prompts
    size, grown = shards.manifest.settings["batch_size"], _grown(shards.manifest)
    for number, batch in enumerate(plan.batches(size, grown)):
        if done < skip:  # shards end where batches end
            done += len(batch)
            continue

        def step(fraction: float, tokens: int, done: int = done, batch: list[int] = batch) -> None:
            nonlocal new_tokens
            new_tokens += tokens
            on_progress(CaptureProgress(done + fraction * len(batch), total, new_tokens))

        turns, taken = turns_of(batch, number, step)
        kept = [(i, one) for i, of in zip(batch, turns, strict=True) for one in joined(of, train)]
        sequences = [one.ids for _, one in kept]
        if taken is None and reader:
            taken = []
            for states in reader.read(sequences):
                taken.append(states)
                step(1 - share + share * len(taken) / len(sequences), 0)
        shards.append(
            sequences,
            [one.mask for _, one in kept],
            [plan.first + i for i, _ in kept],
            [hidden for hidden, _ in taken or ()],
            [final for _, final in taken or ()],
            [plan.prompts[i].prompt.root for i, _ in kept],
        )
        done += len(batch)
        on_progress(CaptureProgress(done, total, new_tokens))
    shards.finish()


def _resume(plan: CapturePlan) -> Manifest | None:
    """The manifest to go on with, None to start afresh. `UserError` if the store is another's."""
    out = plan.config.out
    if plan.config.overwrite:
        return None
    if not (out / NAME).exists():
        require_own(out)
        return None
    found = read_manifest(out)
    _grow(found, plan)
    compare(found, plan)
    FeatureStore.open(out, allow_incomplete=True, verify=True)
    return found


def require_own(out: Path) -> None:
    """Raise `UserError` for a folder without a store that has other files than ours."""
    if any(path.name not in {*FILES, ANSWERS} for path in out.iterdir()):
        raise UserError(
            "is a folder with other files in it, not a feature store",
            where=out,
            hint="choose a new or empty folder for --out",
        )


def _grow(found: Manifest, plan: CapturePlan) -> None:
    """Let a complete store have more prompts, where those that it has are the first of them."""
    count = found.settings.get("prompts_count", 0)
    if not found.complete or count >= len(plan.prompts):
        return
    if hash_of(plan.prompts[:count]) != found.settings.get("prompts_sha256"):
        return
    wanted = plan.manifest(0).settings
    before = {"limit": found.settings["limit"], "prompts": count}
    found.settings |= {name: wanted[name] for name in GROWING}
    found.settings[GROWN] = [*found.settings.get(GROWN, []), before]
    found.complete = False


def _grown(manifest: Manifest) -> list[int]:
    """How many prompts the store had each time before it grew."""
    return [before["prompts"] for before in manifest.settings.get(GROWN, [])]


def compare(found: Manifest, plan: CapturePlan) -> None:
    """Raise `UserError` where what lies there was captured with other settings than the plan's."""
    batch_size = plan.config.batch_size or found.settings.get("batch_size", 0)
    wanted = plan.manifest(batch_size)
    pairs: list[tuple[str, Any, Any]] = [
        ("target", found.target["sha256"][:12], wanted.target["sha256"][:12]),
        ("layer_ids", list(found.layer_ids), list(wanted.layer_ids)),
        ("dtype", found.dtype, wanted.dtype),
        ("features", found.features, wanted.features),
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
                hint=AGAIN,
            )


def announce(plan: CapturePlan, manifest: Manifest, say: Callable[[str], None]) -> None:
    """Say how much there is to do. `UserError` where the disk has no room for it."""
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
