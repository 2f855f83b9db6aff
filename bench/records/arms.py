"""The arms of a comparison: what drafts for the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.registry import read_draft

LABELS = {
    "none": "No speculation",
    "ngram": "N-gram",
    "base": "Base draft",
    "lora": "LoRA",
    "afa-lora": "AFA-LoRA",
    "full": "Full fine-tuning",
}


@dataclass(frozen=True)
class Arm:
    """A name and its draft: an opened one, `"ngram"` (prompt lookup) or None (no draft).

    `"unknown"` is what a running server drafts with and does not tell.
    """

    name: str
    draft: DraftInfo | Literal["ngram", "unknown"] | None = None

    @property
    def drafter(self) -> DraftInfo | Literal["ngram"] | None:
        """What an engine that we start drafts with."""
        assert self.draft != "unknown"
        return self.draft

    @property
    def label(self) -> str:
        """The name as a reader likes it."""
        return LABELS.get(self.name, self.name)


def parse_arm(text: str) -> Arm:
    """An arm from `NAME=FOLDER`, or from a folder alone, which then names it."""
    name, found, folder = text.partition("=")
    if not found:
        name, folder = Path(text).name, text
    if not name or not folder:
        raise UserError(
            f"cannot read the draft {text!r}",
            hint="write --draft NAME=FOLDER, for example --draft base=models/base-draft",
        )
    if name in ("none", "ngram"):
        raise UserError(
            f"the name {name!r} belongs to the arm of that kind",
            hint="give the draft another name, for example base or lora",
        )
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"no such folder (the draft {name!r})",
            where=path,
            hint="give the folder of a draft checkpoint: config.json and *.safetensors",
        )
    return Arm(name, read_draft(path))


def choose_arms(drafts: list[str], *, none: bool = True, ngram: bool = False) -> tuple[Arm, ...]:
    """The arms of a run, in reporting order. Raises `UserError` for doubles and for no arm."""
    arms = [Arm("none")] if none else []
    if ngram:
        arms.append(Arm("ngram", "ngram"))
    arms += [parse_arm(text) for text in drafts]
    names = [arm.name for arm in arms]
    require_distinct(names, "drafts", "--draft first=FOLDER --draft second=FOLDER")
    if not arms:
        raise UserError("there is nothing to measure", hint="give at least one --draft")
    return tuple(arms)


def require_distinct(names: list[str], kind: str, example: str) -> None:
    """Raise `UserError` where two of a `kind` have the same name."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(
            f"two {kind} have the name {doubles[0]!r}", hint=f"name them apart: {example}"
        )
