"""The arms of a comparison: what drafts for the target."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.registry import read_draft
from serving.speculation import BLOCKS, WITHOUT_FOLDER, Drafter, K, WithoutFolder, usual_k

LABELS = {
    "none": "No speculation",
    "ngram": "N-gram",
    "suffix": "Suffix decoding",
    "mtp": "The target's own head",
    "base": "Base draft",
    "lora": "LoRA",
    "afa-lora": "AFA-LoRA",
    "full": "Full fine-tuning",
}
FIELD = re.compile(r",(?=[a-z_]+=)")  # what begins a field behind a folder


@dataclass(frozen=True)
class Arm:
    """A name and what drafts: an opened draft, what needs no folder (`"ngram"`, `"suffix"`,
    `"mtp"`), or None (no draft).

    `"unknown"` is what a running server drafts with and does not tell. `fields` are this arm's own
    of vLLM's `speculative_config`.
    """

    name: str
    draft: DraftInfo | WithoutFolder | Literal["unknown"] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def drafter(self) -> Drafter:
        """What an engine that we start drafts with."""
        assert self.draft != "unknown"
        return self.draft

    def k(self, default: int) -> int:
        """Speculative tokens per step: its own number, or that of the run."""
        return int(self.fields.get(K, default))

    @property
    def label(self) -> str:
        """The name as a reader likes it."""
        return LABELS.get(self.name, self.name)


def parse_arm(text: str) -> Arm:
    """An arm from `NAME=SOURCE[,FIELD=VALUE...]`, where SOURCE is a folder or what needs none.

    A source alone names the arm too. Values are JSON, or texts; `k` is short for vLLM's name of it.
    """
    alone = Path(text).is_dir()  # whatever signs its name has
    whole = alone or Path(text.partition("=")[2]).is_dir()
    source, *given = [text] if whole else FIELD.split(text)
    name, found, folder = source.partition("=")
    if alone or not found:
        name, folder = Path(source).name, source
    if not name or not folder:
        raise UserError(
            f"cannot read the draft {text!r}",
            hint="write --draft NAME=FOLDER, for example --draft base=models/base-draft",
        )
    fields = _fields(name, given)
    without = next((one for one in WITHOUT_FOLDER if one == folder), None)
    if name in ("none", *WITHOUT_FOLDER) and name != without:
        raise UserError(
            f"the name {name!r} belongs to the arm of that kind",
            hint="give the draft another name, for example base or lora",
        )
    if without:
        return Arm(name, without, fields)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(
            f"no such folder (the draft {name!r})",
            where=path,
            hint="give the folder of a draft checkpoint: config.json and *.safetensors",
        )
    return Arm(name, read_draft(path), fields)


def _fields(name: str, given: Sequence[str]) -> dict[str, Any]:
    """The fields of an arm by vLLM's names."""
    fields: dict[str, Any] = {}
    for text in given:
        key, _, value = text.partition("=")
        key = K if key == "k" else key
        if key in fields:
            raise UserError(f"the draft {name!r} has {key} twice", hint="give it once")
        try:
            fields[key] = json.loads(value)
        except json.JSONDecodeError:
            fields[key] = value
    k = fields.get(K, 1)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise UserError(
            f"the draft {name!r} has k={k}, expected a number of tokens",
            hint=f"write --draft {name}=FOLDER,k=5",
        )
    return fields


def choose_arms(
    drafts: list[str], *, none: bool = True, without_folder: Sequence[WithoutFolder] = ()
) -> tuple[Arm, ...]:
    """The arms of a run, in reporting order. Raises `UserError` for doubles and for no arm."""
    arms = [Arm("none")] if none else []
    arms += [Arm(one, one) for one in without_folder]
    arms += [parse_arm(text) for text in drafts]
    names = [arm.name for arm in arms]
    require_distinct(names, "drafts", "--draft first=FOLDER --draft second=FOLDER")
    if not arms:
        raise UserError("there is nothing to measure", hint="give at least one --draft")
    return tuple(arms)


def with_own_k(arm: Arm) -> Arm:
    """An arm whose draft fills a block drafts all of it, unless it says otherwise itself."""
    draft = arm.draft
    if not isinstance(draft, DraftInfo) or draft.method not in BLOCKS or K in arm.fields:
        return arm
    return replace(arm, fields={**arm.fields, K: usual_k(draft)})


def require_distinct(names: list[str], kind: str, example: str) -> None:
    """Raise `UserError` where two of a `kind` have the same name."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(
            f"two {kind} have the name {doubles[0]!r}", hint=f"name them apart: {example}"
        )
