"""What a loop did, line by line: its state is the last line's, so that a kill changes nothing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from drafts.errors import UserError
from drafts.files import disk_errors

State = Literal["watch", "collect", "trial", "adapt", "gate", "swap", "probation", "restore"]
Outcome = Literal["kept", "not worth it", "gated out", "rolled back", "replaced", "failed"]
FILE = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """The loop is in `state` since `at` (Unix seconds), in its `cycle` (0: none yet), for the
    reasons that `words` give. `data` is what the state needs."""

    at: float
    cycle: int
    state: State
    words: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome | None:
        """How a cycle ended, where it did with this entry."""
        return self.data.get("outcome")

    @property
    def when(self) -> str:
        """UTC, to the second."""
        return datetime.fromtimestamp(self.at, UTC).strftime("%Y-%m-%d %H:%M:%S")


class History:
    """The journal of a loop's folder; entries are on the disk when `add` returns."""

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Read it; a line that a kill cut is dropped. Raises `UserError` for a damaged one."""
        self.path = folder / FILE
        self.entries: list[Entry] = []
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            self.entries.append(self._read(line, number))
        if whole < len(data) and not read_only:
            os.truncate(self.path, whole)

    def _read(self, line: bytes, number: int) -> Entry:
        try:
            entry = Entry(**json.loads(line))
            if entry.state not in get_args(State):
                raise ValueError(f"state {entry.state!r}")
        except (ValueError, TypeError) as error:
            raise UserError(
                f"line {number} is no entry of a loop ({error})",
                where=self.path,
                hint="choose another --out, or mend the line",
            ) from None
        return entry

    @property
    def last(self) -> Entry:
        """The present state."""
        return self.entries[-1] if self.entries else Entry(0.0, 0, "watch", "begins")

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        line = json.dumps(asdict(entry), ensure_ascii=False) + "\n"
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def of(self, cycle: int) -> list[Entry]:
        """The entries of one cycle, the one that ended it last."""
        return [entry for entry in self.entries if entry.cycle == cycle]

    def found(self, cycle: int, name: str) -> Any:
        """What the last entry of a cycle that has it says of `name`; None where none has."""
        values = [entry.data[name] for entry in self.of(cycle) if name in entry.data]
        return values[-1] if values else None
