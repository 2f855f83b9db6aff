"""How a row that cannot be used is told of."""

from __future__ import annotations

from typing import Any

from drafts.errors import UserError

MEND = "repair or remove this line; --skip-bad-rows drops and counts such rows"


def wrong(found: str, expected: str, where: str) -> UserError:
    """The error for a row: what was found in it, and what was expected there."""
    return UserError(f"{found}; expected {expected}", where=where, hint=MEND)


def kind_of(value: Any) -> str:
    """A JSON value's kind in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    empty = isinstance(value, (list, dict, str)) and not value
    return ("empty: " if empty else "") + names.get(type(value), type(value).__name__)


def shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def text_of(value: Any, name: str, where: str) -> str:
    """`value` if it is text that says something. Raises `UserError` where it is not."""
    if not isinstance(value, str):
        raise wrong(f"{name} is {kind_of(value)}", "text", where)
    if not value.strip():
        raise wrong(f"{name} is empty", "some text", where)
    return value
