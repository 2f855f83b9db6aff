"""What a draft was trained on: the roots of its prompts, beside its weights.

So that a measurement can say that it asks what the draft has seen. vLLM reads no such file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.records.arms import Arm
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json, write_json

NAME = "afaspec_training.json"


def write_roots(folder: Path, roots: Iterable[int]) -> None:
    """Write `roots` (`Prompt.root`) to the folder, sorted, as 16 hexadecimal digits each.

    Nothing is written where there are none.
    """
    if found := sorted(set(roots)):
        write_json(folder / NAME, {"trained_on": [f"{root:016x}" for root in found]})


def read_roots(folder: Path) -> frozenset[int]:
    """The roots that a draft or a run in `folder` was trained on; none where nothing says so."""
    path = folder / NAME
    if not path.is_file():
        return frozenset()
    try:
        return frozenset(int(root, 16) for root in read_json(path)["trained_on"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            'expected {"trained_on": ["16 hexadecimal digits", ...]}',
            where=path,
            hint="merge the draft again, or remove this file",
        ) from None


def trained_on_warnings(arms: Sequence[Arm], roots: Sequence[int | None]) -> dict[str, str]:
    """By arm name a warning where the arm's draft was trained on prompts that are measured.

    `roots` are those of the prompts, None where one is not known.
    """
    found = {}
    for arm in arms:
        if not isinstance(arm.draft, DraftInfo):
            continue
        known = read_roots(arm.draft.folder)
        if count := sum(root in known for root in roots):
            found[arm.name] = (
                f"{arm.label} was trained on {count} of the {len(roots)} prompts measured, or on "
                "others that begin alike: its acceptance on new prompts may be lower "
                "(--split eval with the --eval-fraction of the capture measures on others)"
            )
    return found
