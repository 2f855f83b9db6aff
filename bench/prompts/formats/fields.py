"""`--field NAME=PATH`: where rows of another shape have what a prompt is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from bench.prompts.formats.faults import wrong
from bench.prompts.formats.messages import parsed

ASKED = ("messages", "conversations", "conversation", "turns", "prompt", "question", "instruction",
         "text")  # fmt: skip
IN_MESSAGES = ("role", "content")
MISSING = object()


def renamed(
    row: dict[str, Any], fields: Mapping[str, str], where: str, used: Counter[str]
) -> dict[str, Any]:
    """The row with each field's value under its name; `used` counts the fields that were there.

    Where a field says what is asked, no other part of the row does. Raises `UserError` where the
    row lacks it. Of `role` and `content`, those of every message are meant.
    """
    asked = [name for name in fields if name in ASKED]
    kept = {k: v for k, v in row.items() if k not in (*ASKED, "body", "request")} if asked else row
    found = dict(kept)
    for name in (name for name in fields if name not in IN_MESSAGES):
        value = value_at(row, fields[name])
        if value is not MISSING:
            used[name] += 1
            found[name] = value
        elif name in asked:
            keys = ", ".join(sorted(map(str, row)))
            raise wrong(f"has no {fields[name]!r} (it has {keys})", f"it, as {name}", where)
    inside = {name: fields[name] for name in IN_MESSAGES if name in fields}
    for name in ("messages", "conversations", "conversation"):
        messages = parsed(found.get(name)) if inside else None
        if isinstance(messages, list):
            found[name] = [_message(message, inside, used) for message in messages]
    return found


def value_at(row: Any, path: str) -> Any:
    """What lies at a dotted path of keys and of numbers in lists; `MISSING` if nothing does."""
    row = parsed(row)
    if isinstance(row, dict) and path in row:
        return row[path]
    first, dot, rest = path.partition(".")
    inner: Any = MISSING
    if isinstance(row, dict):
        inner = row.get(first, MISSING)
    elif isinstance(row, list) and first.isdecimal() and int(first) < len(row):
        inner = row[int(first)]
    return value_at(inner, rest) if dot and inner is not MISSING else inner


def _message(message: Any, inside: Mapping[str, str], used: Counter[str]) -> Any:
    if not isinstance(message, dict):
        return message
    values = {name: value_at(message, path) for name, path in inside.items()}
    used.update(name for name, value in values.items() if value is not MISSING)
    return message | {name: value for name, value in values.items() if value is not MISSING}
