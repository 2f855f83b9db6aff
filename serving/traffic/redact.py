"""What is taken out of texts before they are kept."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from drafts.errors import UserError

MARK = "[redacted]"
Redact = Callable[[str], str]


def make_redactor(patterns: Sequence[str], function: str | None = None) -> Redact | None:
    """One function of all; None where nothing is to be taken out.

    `patterns` are regular expressions; what they match becomes `[redacted]`. `function` is
    `module:name` of one that gets a text and gives one. Raises `UserError` for what is neither.
    """
    compiled = [_compiled(pattern) for pattern in patterns]
    own = _imported(function) if function else None
    if not compiled and own is None:
        return None

    def redact(text: str) -> str:
        for pattern in compiled:
            text = pattern.sub(MARK, text)
        return text if own is None else own(text)

    return redact


def redacted(value: Any, redact: Redact) -> Any:
    """All texts in a value of JSON, but for the names of its fields."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redacted(one, redact) for one in value]
    if isinstance(value, dict):
        return {name: redacted(one, redact) for name, one in value.items()}
    return value


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"{pattern!r} is no regular expression ({error})", hint="correct --redact"
        ) from None


def _imported(function: str) -> Redact:
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{function!r} cannot be imported ({error})",
            hint="give --redact-function module:name of a function of one text",
        ) from None
    try:
        tried = found("")
    except Exception as error:  # whatever a user's function raises
        tried = error
    if tried != "":
        raise UserError(
            f"{function!r} makes {tried!r} of an empty text",
            hint="give a function that takes a text and gives the text to keep",
        )
    redact: Redact = found
    return redact
