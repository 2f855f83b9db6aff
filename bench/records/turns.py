"""The turns of a run as they end: a line each, from which an interrupted run goes on.

The first line says what is measured. A line is on the disk before the next turn begins; one that a
kill cut is measured again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from bench.records.plain import plain
from drafts.errors import UserError

SCHEMA = "afaspec-turns/1"

Key = tuple[int | str, ...]  # where in a run: places of load, round or block, and an arm's name
Turn = TypeVar("Turn")  # what an arm gave then, a dataclass


@dataclass
class Turns(Generic[Turn]):
    """The turns that have ended, by place. Without a `path` they are kept nowhere.

    The file begins, with the run's `settings`, when the first of them has ended.
    """

    path: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ended: dict[Key, Turn] = field(default_factory=dict)

    def add(self, key: Key, turn: Turn) -> None:
        """Keep a turn, on the disk when this returns."""
        self.ended[key] = turn
        if self.path is None:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, {"schema": SCHEMA, "settings": self.settings})
        _append(self.path, {"key": key, **vars(turn)})


def file_name(arms: Sequence[str]) -> str:
    """The file of the turns of these arms, which are measured together."""
    marks = "-".join(re.sub(r"[^\w.-]", "_", name) for name in arms)
    return f"turns-{marks[:100]}.jsonl"


def forget_turns(folder: Path) -> None:
    """Remove all such files: the report has what they have."""
    for path in folder.glob("turns-*.jsonl"):
        path.unlink()


def open_turns(path: Path, settings: Mapping[str, Any], kind: type[Turn]) -> Turns[Turn]:
    """The turns, of that kind, at `path` of a run with these settings; none where none has ended.

    Raises `UserError` where the file is of a run with other settings, or no such file.
    """
    described = json.loads(json.dumps(settings))
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    whole, cut = lines[:-1], lines[-1]
    if len(whole) < 2:  # killed before a turn was whole: nothing is lost
        path.unlink(missing_ok=True)
        return Turns(path, described)
    first = _read(path, 1, whole[0])
    if first.get("schema") != SCHEMA:
        raise UserError(
            f"has schema {first.get('schema')!r}, expected {SCHEMA!r}",
            where=path,
            hint="give another --out",
        )
    before = first["settings"]
    if differing := [name for name in described if described[name] != before.get(name)]:
        raise UserError(
            "an interrupted run lies here that was begun with other settings: "
            + "; ".join(f"{name} was {before.get(name)}" for name in differing),
            where=path,
            hint="give another --out, or remove the file to measure anew",
        )
    if cut:
        os.truncate(path, path.stat().st_size - len(cut))
    turn = TypeAdapter(kind)
    ended: dict[Key, Turn] = {}
    for number, line in enumerate(whole[1:], start=2):
        content = _read(path, number, line)
        key = tuple(content.pop("key"))
        ended[key] = turn.validate_python(content)
    return Turns(path, described, ended)


def _append(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(content, default=plain).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        raise UserError(
            f"line {number} is no turn of a run: {line[:80]!r}",
            where=path,
            hint="remove the file to measure anew",
        ) from None
