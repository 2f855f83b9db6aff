"""The prompts of a study's domains, and their three splits: train, validation, eval.

Which split a prompt falls into is a matter of its content alone. `afaspec capture` divides train
from eval; the validation split is a part of train, divided by another hash of the same content.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.compare.config import CompareConfig
from afaspec.store.read import FeatureStore
from afaspec.store.read import Sequence as StoredSequence
from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt
from bench.prompts.select import content_sha256
from bench.records.settings import Split
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json, write_json
from drafts.target import TargetInfo

FACTS = "facts.json"
SPLITS: tuple[Split, ...] = ("train", "eval")
Prompts = dict[tuple[str, Split], list[Prompt]]


@dataclass(frozen=True)
class Facts:
    """What a study depends on beside its settings: hashes of models and of prompts.

    `domains` holds, by domain and split, the SHA-256 of the prompts and their number.
    """

    target: str
    target_sha256: str
    draft: str
    draft_sha256: str
    domains: dict[str, dict[str, dict[str, Any]]]

    def write(self, folder: Path) -> None:
        write_json(folder / FACTS, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Facts:
        """Those of the study in `folder`. Raises `UserError` where none was begun."""
        if not (folder / FACTS).exists():
            raise UserError(
                "holds no study yet", where=folder, hint="run afaspec compare without --report-only"
            )
        return cls(**read_json(folder / FACTS))

    def joined_to(self, known: Facts, where: Path) -> Facts:
        """`known`, with the domains that only these have. Raises `UserError` for other models."""
        for name in ("target", "draft"):
            if getattr(self, f"{name}_sha256") != getattr(known, f"{name}_sha256"):
                raise UserError(
                    f"was made with another {name}", where=where, hint="give another --out"
                )
        return replace(known, domains=self.domains | known.domains)


@dataclass(frozen=True)
class Division:
    """Sequence numbers in a domain's train store, shuffled, so that the first few are a sample.

    `dropped` is the number of those that repeat prompts of another split.
    """

    train: list[int]
    validation: list[int]
    dropped: int


def read_study_prompts(
    config: CompareConfig,
    target: TargetInfo,
    draft: DraftInfo,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[Facts, Prompts]:
    """Read every domain's prompts and hash all that results depend on. Loads no model.

    Raises `UserError` for the first fault, before any work is done.
    """
    prompts: Prompts = {}
    domains: dict[str, dict[str, dict[str, Any]]] = {}
    for name, domain in config.domains.items():
        domains[name] = {}
        for split in SPLITS:
            of_split = capture_config(config, name, split, config.out)
            found = read_prompts(
                of_split.prompts,
                of_split,
                seed=of_split.seed,
                suffixes=tuple(of_split.suffixes) if of_split.suffixes else None,
                note=note if split == "train" else None,
            )
            prompts[name, split] = found
            domains[name][split] = {"sha256": content_sha256(found), "prompts": len(found)}
        held = [in_validation(p, config.tuning.validation) for p in prompts[name, "train"]]
        most = max(samples or 1 for samples in config.samples)
        if all(held) or not any(held):
            raise UserError(
                f"all of its {len(held)} prompts to train on fall on one side of the division "
                "into training and validation",
                where=domain.prompts,
                hint="give more prompts (train_limit) or another tuning.validation",
            )
        if held.count(False) < most:
            raise UserError(
                f"has {held.count(False)} prompts to train on, samples asks for {most}",
                where=domain.prompts,
                hint="raise train_limit, give more prompts, or lower samples",
            )
    models = (str(target.folder), target.sha256, str(draft.folder), draft.sha256)
    return Facts(*models, domains), prompts


def capture_config(config: CompareConfig, domain: str, split: Split, out: Path) -> CaptureConfig:
    """The capture of one split of a domain."""
    settings = config.domains[domain]
    shared = settings.model_dump(exclude={"train_limit", "eval_limit"})
    return CaptureConfig(
        **shared,
        target=str(config.target),
        target_adapter=config.target_adapter,
        draft=config.draft,
        out=out,
        split=split,
        limit=settings.train_limit if split == "train" else settings.eval_limit,
    )


def in_validation(prompt: Prompt, share: float) -> bool:
    """Whether a prompt of the train split is held out. Near-copies are held out together."""
    key = " ".join(prompt.split_key.split())
    digest = hashlib.sha256(f"validation\n{key}".encode("utf-8", "surrogatepass")).hexdigest()
    return int(digest[:13], 16) < share * 16**13


def divide_store(
    train: FeatureStore, evaluation: FeatureStore, prompts: Sequence[Prompt], share: float
) -> Division:
    """The splits of a domain's captured sequences; `prompts` are those of its train store.

    A prompt that is, token for token, also one of eval is dropped from train and validation, and
    one of validation is dropped from train: passages of different files can begin alike.
    """
    seen = {_prompt_ids(sequence) for sequence in evaluation}
    held = [in_validation(prompt, share) for prompt in prompts]
    chosen: dict[bool, list[int]] = {True: [], False: []}
    for validation in (True, False):
        mine = [i for i in range(len(train)) if held[train[i].prompt_index] == validation]
        chosen[validation] = [i for i in mine if _prompt_ids(train[i]) not in seen]
        seen |= {_prompt_ids(train[i]) for i in chosen[validation]}
    if not chosen[True] or not chosen[False]:
        raise UserError(
            "its prompts of train, validation and eval are the same",
            where=train.folder,
            hint="give more varied prompts",
        )
    dropped = len(train) - len(chosen[True]) - len(chosen[False])
    for numbers in chosen.values():  # a store has answers of like length together
        random.Random(0).shuffle(numbers)
    return Division(chosen[False], chosen[True], dropped)


def _prompt_ids(sequence: StoredSequence) -> tuple[int, ...]:
    return tuple(sequence.input_ids[~sequence.loss_mask].tolist())
