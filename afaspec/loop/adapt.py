"""A new draft of recent traffic: the rows, a trial, the training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import CaptureProgress, capture
from afaspec.checkpoints.merge import merge
from afaspec.loop.config import LoopConfig
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from afaspec.train.record import MANIFEST, Trained
from afaspec.train.run import train
from bench.records.settings import Split
from drafts.checkpoint.info import DraftInfo
from drafts.files import atomic_file, read_json
from drafts.registry import read_draft
from drafts.target.info import TargetInfo
from serving.traffic.shards import KEY, Traffic

ROWS = "traffic.jsonl"
OWNER_FILE = 0o600


@dataclass(frozen=True)
class Work:
    """What adapting works on. `stage(name, done, total)` follows progress, `say` gets lines."""

    config: LoopConfig
    target: TargetInfo
    base: DraftInfo
    k: int
    stage: Callable[[str, int, int], None]
    say: Callable[[str], None]


def recent_rows(config: LoopConfig, since: float) -> list[dict[str, Any]]:
    """The newest rows of the traffic after `since` (Unix seconds), the oldest first."""
    begin = datetime.fromtimestamp(since, UTC).isoformat()
    store = Traffic(config.traffic, key=os.environ.get(KEY))
    rows = [row for row in store.rows(since) if row["time"] >= begin]
    return rows[-config.rows :]


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Keep them in a cycle's folder, readable by their owner alone."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with atomic_file(folder / ROWS) as temporary:
        temporary.touch(mode=OWNER_FILE)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def traffic_store(work: Work, folder: Path, draft: DraftInfo) -> FeatureStore:
    """The answers that the server gave to the train side of a cycle's rows, with their states."""
    return _captured(
        work, str(folder / ROWS), "train", folder / "store", draft,
        use_responses=True, skip_bad_rows=True, eval_fraction=work.config.eval_fraction,
    )  # fmt: skip


def general_store(work: Work, split: Split) -> FeatureStore:
    """The target's answers to general prompts: to replay, or to say what is kept. Made once."""
    config = work.config
    share = config.mix / (1 - config.mix)
    limit = config.general_prompts if split == "eval" else max(1, round(share * config.rows))
    return _captured(
        work, config.general, split, config.out / f"general-{split}", work.base,
        limit=limit, eval_fraction=0.5, max_new_tokens=config.new_tokens,
    )  # fmt: skip


def _captured(
    work: Work, prompts: str, split: Split, out: Path, draft: DraftInfo, **settings: Any
) -> FeatureStore:
    name = f"{out.name}, states"

    def on_progress(progress: CaptureProgress) -> None:
        work.stage(name, int(progress.done), progress.total)

    config = CaptureConfig(
        target=str(work.target.folder), prompts=prompts, out=out, draft=str(draft.folder),
        split=split, seed=work.config.seed, generate_with="transformers", **settings,
    )  # fmt: skip
    return capture(config, work.target, draft, on_progress, work.say)


@dataclass(frozen=True)
class Trial:
    """What some steps brought. Lengths are held-out ones of the run; `seconds` are of its steps."""

    steps: int
    base: float
    length: float
    seconds: float

    @property
    def gain(self) -> float:
        """As a share of the base's."""
        return self.length / self.base - 1


def trial(work: Work, folder: Path, begin: DraftInfo) -> Trial:
    """Train a few steps on a cycle's rows and see what they bring."""
    steps = work.config.trial_steps
    done = _trained(work, folder, begin, folder / "trial", steps)
    seconds = float(read_json(done.folder / MANIFEST)["seconds"])
    return Trial(steps, done.base_length, done.length, seconds)


def adapt(work: Work, folder: Path, begin: DraftInfo) -> DraftInfo:
    """Train on a cycle's rows, mixed with general ones, and merge: the new draft."""
    merged = folder / "draft"
    if not merged.exists():
        done = _trained(work, folder, begin, folder / "adapter", work.config.steps)
        merge(done.folder, begin, merged, work.target)
    return read_draft(merged)


def _trained(work: Work, folder: Path, begin: DraftInfo, out: Path, steps: int) -> Trained:
    config = work.config
    store = traffic_store(work, folder, begin)
    mix = None
    if config.mix:
        mix = [f"{general_store(work, 'train').folder}={config.mix:g}"]
    settings = TrainConfig(
        store=store.folder,
        draft=str(begin.folder),
        out=out,
        arm=config.arm,
        rank=config.rank,
        steps=steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        draft_steps=work.k,
        eval_every=max(10, steps // 5),
        checkpoint_every=max(10, steps // 10),
        seed=config.seed,
        mix=mix,
    )

    def report(row: dict[str, Any]) -> None:
        work.stage(f"training ({out.name})", row["step"], steps)

    return train(settings, store, begin, work.target, report, note=work.say)
