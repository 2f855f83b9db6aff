"""All rows of a source: their prompts, and one list of those that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from bench.prompts.formats.fields import renamed
from bench.prompts.formats.files import decode_line, whole_characters
from bench.prompts.formats.shapes import parse_row
from bench.prompts.rows import Prompt
from bench.records.settings import PromptSettings
from drafts.errors import UserError

Made = TypeVar("Made")
LISTED = 20  # bad rows that an error tells one by one


def parse_rows(
    rows: Iterable[tuple[str, Any]],
    source: str,
    settings: PromptSettings,
    seed: int = 0,
    note: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """The prompts of all rows, each with its place; bytes are a line of JSON.

    `seed` places the passages of long texts. `note` is told what was replaced, taken for something
    or dropped. Raises one `UserError` that lists the bad rows, unless they are to be dropped.
    """
    say, fields = note or (lambda text: None), settings.fields_by_name
    prompts: list[Prompt] = []
    bad: list[UserError] = []
    seen: Counter[str] = Counter()
    used: Counter[str] = Counter()
    count = 0
    for where, row in rows:
        count += 1
        try:
            if isinstance(row, bytes):
                row = decode_line(row, where, seen)
            else:
                row = whole_characters(row, seen)
            if fields and isinstance(row, dict):
                row = renamed(row, fields, where, used)
            prompts += parse_row(row, where, seen, prompt_tokens=settings.prompt_tokens, seed=seed)
        except UserError as error:
            bad.append(error)
    if bad and not settings.skip_bad_rows:
        raise bad[0] if len(bad) == 1 else _all_bad(bad, count, source)
    unused = [name for name in fields if not used[name]]
    if count and unused:
        raise UserError(
            f"no row has {fields[unused[0]]!r}, the field {unused[0]}",
            where=source,
            hint="correct --field",
        )
    if bad and not prompts:
        raise _all_bad(bad, count, source)
    for what, number in sorted(seen.items()):
        say(f"{source}: {number} {what}")
    if bad:
        say(f"{source}: {len(bad)} of {count} rows are bad and left out:\n{_listed(bad)}")
    return prompts


def usable(
    prompts: Iterable[Prompt],
    make: Callable[[Prompt], Made],
    source: str,
    *,
    skip: bool,
    note: Callable[[str], None] | None = None,
) -> list[Made]:
    """What `make` makes of each prompt. `UserError`s of it are raised as one that lists them, or,
    with `skip`, told to `note`, unless nothing is left."""
    made: list[Made] = []
    bad: list[UserError] = []
    for prompt in prompts:
        try:
            made.append(make(prompt))
        except UserError as error:
            bad.append(error)
    count = len(made) + len(bad)
    if bad and (not skip or not made):
        raise bad[0] if len(bad) == 1 else _all_bad(bad, count, source)
    if bad and note:
        note(f"{source}: {len(bad)} of {count} prompts are bad and left out:\n{_listed(bad)}")
    return made


def _all_bad(bad: list[UserError], count: int, source: str) -> UserError:
    return UserError(
        f"{len(bad)} of its {count} rows cannot be used:\n{_listed(bad)}",
        where=source,
        hint="repair or remove these lines; --skip-bad-rows drops and counts such rows",
    )


def _listed(bad: list[UserError]) -> str:
    lines = [f"  {error.where}: {error.problem}" for error in bad[:LISTED]]
    return "\n".join([*lines, *([f"  and {len(bad) - LISTED} more"] if len(bad) > LISTED else [])])
