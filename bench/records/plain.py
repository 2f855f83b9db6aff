"""Records as JSON, without a second copy of them in memory."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, TextIO

CONTAINERS = (list, tuple, Mapping)


def plain(value: Any) -> Any:
    """For `json.dumps(..., default=plain)`: a dataclass as its fields, an array as its numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    if isinstance(value, array):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not written as JSON")


def write_streamed(value: Any, file: TextIO) -> None:
    """Write `value` as `json.dumps(value, default=plain)` would, a part of it at a time."""
    for piece in _pieces(value):
        file.write(piece)


def _pieces(value: Any) -> Iterator[str]:
    """Objects, and lists of what is none of the plain values, part by part; all else at once."""
    fields = vars(value) if is_dataclass(value) and not isinstance(value, type) else value
    if isinstance(fields, Mapping) and any(isinstance(v, CONTAINERS) for v in fields.values()):
        yield from _joined("{}", ([json.dumps(str(k)) + ": ", v] for k, v in fields.items()))
    elif isinstance(value, list | tuple) and value and not _is_leaf(value[0]):
        yield from _joined("[]", (["", one] for one in value))
    else:
        yield json.dumps(value, default=plain)


def _joined(brackets: str, parts: Iterator[list[Any]]) -> Iterator[str]:
    yield brackets[0]
    for place, (before, value) in enumerate(parts):
        yield ", " + before if place else before
        yield from _pieces(value)
    yield brackets[1]


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)
