"""The prompts of a study's domains, and their three splits: train, validation, eval.

Which split a prompt falls into is a matter of its content alone. `afaspec capture` divides train
from eval; the validation split is the part of train that comes next in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from afaspec.capture.config import CaptureConfig
from afaspec.compare.config import GENERAL, CompareConfig
from afaspec.store.division import Division, divide
from afaspec.store.read import FeatureStore
from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt
from bench.prompts.select import content_sha256, is_held_out, side_of
from bench.records.settings import Split
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json, write_json
from drafts.target.info import TargetInfo

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
    for name, domain in config.sets.items():
        domains[name] = {}
        for split in SPLITS:
            of_split = capture_config(config, name, split, config.out)
            found = read_prompts(
                of_split.source,
                of_split,
                seed=of_split.seed,
                suffixes=tuple(of_split.suffixes) if of_split.suffixes else None,
                note=note if split == "train" else None,
            )
            prompts[name, split] = found
            domains[name][split] = {"sha256": content_sha256(found), "prompts": len(found)}
        side = side_of("train", domain.eval_fraction)
        share = config.tuning.validation
        held = [is_held_out(p.root, share, side) for p in prompts[name, "train"]]
        most = max(samples or 1 for samples in config.samples)
        if all(held) or not any(held):
            raise UserError(
                f"all of its {len(held)} prompts to train on fall on one side of the division "
                "into training and validation",
                where=domain.prompts,
                hint="give more prompts (train_limit) or another tuning.validation",
            )
        if name != GENERAL and held.count(False) < most:
            raise UserError(
                f"has {held.count(False)} prompts to train on, samples asks for {most}",
                where=domain.prompts,
                hint="raise train_limit, give more prompts, or lower samples",
            )
    models = (str(target.folder), target.sha256, str(draft.folder), draft.sha256)
    return Facts(*models, domains), prompts


def capture_config(config: CompareConfig, domain: str, split: Split, out: Path) -> CaptureConfig:
    """The capture of one split of a domain."""
    settings = config.sets[domain]
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


def divide_store(train: FeatureStore, evaluation: FeatureStore, share: float) -> Division:
    """The train and validation splits of a domain's train store.

    A prompt that is, token for token, also one of eval is dropped from both: passages of different
    files can begin alike.
    """
    return divide(train, share, seen=evaluation.prompt_hashes)
