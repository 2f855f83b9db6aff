"""What a run's folder says of the run: its settings, what it was given, and its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from afaspec.capture.config import ReaderSettings
from afaspec.store.read import FeatureStore
from afaspec.train.config import MemorySettings, RunPlace, TrainConfig
from afaspec.train.held_out import Measure, measure_of
from afaspec.train.mix import Part
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json, remove_leftovers, write_json
from drafts.target.info import TargetInfo

CONFIG, MANIFEST = "config.json", "manifest.json"
ANEW = "choose another --out, or remove the folder to start anew"
# How a run is followed, how its loss is computed, and what gives states that are not stored: they
# may change when it goes on.
FREE = {
    *("eval_every", "checkpoint_every", "tensorboard"),
    *("chunk", "compiled", *MemorySettings.model_fields, *ReaderSettings.model_fields),
}


# Of a run's settings, what a draft that is made of it says of its training.
TOLD = (
    *("arm", "rank", "alpha", "init", "steps", "learning_rate", "draft_steps", "loss"),
    *("batch_size", "seed"),
)


def training_summary(run: Path) -> dict[str, Any] | None:
    """How a finished run trained and on what, in short; None where its folder does not say."""
    if not all((run / name).is_file() for name in (CONFIG, MANIFEST)):
        return None
    settings, manifest = read_json(run / CONFIG), read_json(run / MANIFEST)
    store = {k: v for k, v in manifest["store"].items() if k not in ("path", "target")}
    mixed = [
        {"store": Path(one["store"]).name, "share": one["share"],
         "train_sequences": one["train_sequences"]}
        for one in manifest.get("mix") or []
    ]  # fmt: skip
    found = {name: settings[name] for name in TOLD if settings.get(name) is not None}
    if settings.get("arm") == "full":
        found = {k: v for k, v in found.items() if k not in ("rank", "alpha", "init")}
    return {
        **found,
        "best_step": manifest.get("best_step"),
        "data": {"store": Path(manifest["store"]["path"]).name, **store},
        **({"mix": mixed} if mixed else {}),
    }


@dataclass(frozen=True)
class Watched:
    """How good the draft was on a store beside the run's own, and how good the result is there."""

    name: str
    measure: Measure
    before: float
    after: float

    @property
    def words(self) -> str:
        of = "" if self.measure == "acceptance" else f"{self.measure} "
        kept = f"{self.after / self.before:.0%} kept"
        return f"{self.name}: {of}{self.before:.2f} before, {self.after:.2f} after ({kept})"


@dataclass(frozen=True)
class Trained:
    """A finished run: where its result lies and how good it was on held-out sequences.

    `length` is an acceptance length, or for stores of sampled or given responses an agreement
    length, as `measure` says; `base_length` is the base draft's. `watched` are the stores of `mix`.
    `before` says that the run was finished already when it was asked for.
    """

    folder: Path
    result: Path
    best_step: int
    measure: Measure
    length: float
    base_length: float
    watched: tuple[Watched, ...] = ()
    before: bool = False


@dataclass(frozen=True)
class Record:
    """A run's settings and what it was given, as its `config.json` has them."""

    folder: Path
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        draft: DraftInfo,
        target: TargetInfo,
        parts: Sequence[Part],
    ) -> Record:
        """Paths are absolute, so that the run is found from elsewhere; names stay names.

        `parts` are those of the store that is learned and of the stores mixed with it.
        """
        domain, *mixed = parts
        settings = json.loads(config.model_dump_json())
        settings["target"] = settings["target"] or str(target.folder)
        settings["mix"] = [f"{one.store.folder.resolve()}={one.share}" for one in mixed] or None
        for name in RunPlace.model_fields.keys() - {"mix"}:
            if settings[name] and Path(settings[name]).expanduser().exists():
                settings[name] = str(Path(settings[name]).expanduser().resolve())
        settings["inputs"] = {
            "store": domain.store.manifest.content_sha256,
            "draft": draft.sha256,
            "target": target.sha256,
            "held-out part": _hash([_numbers(domain)]),
        }
        if mixed:
            settings["inputs"]["mix"] = _hash(
                [
                    [one.store.manifest.content_sha256, str(one.share), _numbers(one)]
                    for one in mixed
                ]
            )
        return cls(config.out, settings)

    def check(self) -> None:
        """Raise `UserError` where the folder belongs to a run that cannot go on as this one.

        Store, draft and target are compared by what they are, not by where they lie. More steps
        than before prolong a run.
        """
        recorded = self._read()
        if recorded is None:
            return
        if "inputs" not in recorded:
            raise UserError("belongs to a run of an older afaspec", where=self.folder, hint=ANEW)
        compared = self.settings.keys() - RunPlace.model_fields.keys() - FREE - {"inputs", "steps"}
        changed = [
            f"{name} ({recorded.get(name)}, now {self.settings[name]})"
            for name in sorted(compared)
            if recorded.get(name) != self.settings[name]
        ]
        was, now = recorded["inputs"], self.settings["inputs"]
        changed += [
            f"{name} (hash {str(was.get(name))[:12]}, now {str(now.get(name))[:12]})"
            for name in {**now, **was}
            if was.get(name) != now.get(name)
        ]
        if changed:
            raise UserError(
                f"belongs to a run with another {', '.join(changed)}", where=self.folder, hint=ANEW
            )
        if self.settings["steps"] < recorded["steps"]:
            raise UserError(
                f"belongs to a run of {recorded['steps']} steps, now it is "
                f"{self.settings['steps']}: a run can be prolonged, not cut short",
                where=self.folder,
                hint=ANEW,
            )

    def finished(self) -> bool:
        """Is the run there already, of as many steps?"""
        recorded = self._read()
        there = (self.folder / MANIFEST).exists()
        return there and recorded is not None and recorded["steps"] == self.settings["steps"]

    def write(self) -> None:
        """Record the settings; a run that is prolonged is finished no more."""
        for result in ("adapter", "weights"):
            remove_leftovers(self.folder / result)
        if not self.finished():
            (self.folder / MANIFEST).unlink(missing_ok=True)
        if self._read() != self.settings:
            write_json(self.folder / CONFIG, self.settings)

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / CONFIG
        found: dict[str, Any] | None = read_json(path) if path.exists() else None
        return found


def _numbers(part: Part) -> str:
    """SHA-256 of the numbers of the sequences that are trained on and held out."""
    digest = hashlib.sha256()
    for side in (part.train, part.held_out):
        numbers = np.asarray(side, dtype="<i4")
        digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
    return digest.hexdigest()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def result_folder(config: TrainConfig) -> Path:
    """Where the run's result lies: `adapter/` for adapters, `weights/` for full fine-tuning."""
    return config.out / ("weights" if config.arm == "full" else "adapter")


def read_trained(config: TrainConfig, store: FeatureStore) -> Trained:
    """The result of a run that is finished, from its manifest."""
    manifest, measure = read_json(config.out / MANIFEST), measure_of(store)
    return Trained(
        config.out,
        result_folder(config),
        manifest["best_step"],
        measure,
        manifest[f"held_out_{measure}_length"],
        manifest[f"base_{measure}_length"],
        tuple(Watched(**one["watched"]) for one in manifest.get("mix", [])),
        before=True,
    )
