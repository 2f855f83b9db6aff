"""What was written so far, block by block, so that a kill loses one block at most."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.files import atomic_file, disk_errors

AGAIN = "choose another --out, the old settings, or --overwrite to replace it"


@dataclass
class Journal:
    """A file whose first line holds settings, and each further one a block: a list of entries."""

    path: Path
    blocks: list[list[Any]]

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any], *, overwrite: bool = False) -> Journal:
        """Go on with the journal of these settings, or begin it. A line cut by a kill is dropped.

        Raises `UserError` for one of other settings, unless it may be overwritten.
        """
        lines, whole = _whole_lines(path)
        found = lines[0] if lines else None
        if found is not None and found != settings and not overwrite:
            name = next(name for name in settings if found.get(name) != settings[name])
            raise UserError(
                f"was written with other settings: {name} was {found.get(name)}, now it is "
                f"{settings[name]}",
                where=path,
                hint=AGAIN,
            )
        if found != settings:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return cls(path, [])
        os.truncate(path, whole)
        return cls(path, lines[1:])

    def add(self, block: list[Any]) -> None:
        """Append a block; it is on the disk when this returns."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(block) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.blocks.append(block)


def _whole_lines(path: Path) -> tuple[list[Any], int]:
    """What the lines that end hold, and where they end, in bytes."""
    if not path.is_file():
        return [], 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:whole].splitlines()], whole
