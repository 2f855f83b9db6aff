"""A folder of traffic: files of JSON lines that grow one after another, within a size and an age.

    traffic/
      000001.jsonl      a row a line, whole ones alone: what a kill cut off is dropped by the next
      000002.jsonl      writer. With a key a line is a token of Fernet (github.com/fyrnet/spec)
      .lock             held while anybody writes or purges

Requests and answers are their users' data: folder and files are for their owner alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from drafts.errors import UserError
from drafts.files import atomic_file, disk_errors

SHARD_SHARE = 8  # of the size that is allowed: the oldest eighth goes when there is no more room
SHARD_SECONDS_SHARE = 8  # likewise of the age
OWNER_FOLDER, OWNER_FILE = 0o700, 0o600
KEY = "AFASPEC_TRAFFIC_KEY"
Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How much is kept: so many MiB, and rows of so many days."""

    max_mib: float = 1024.0
    max_days: float = 30.0


class Traffic:
    """One folder. Several processes may read it while one writes."""

    def __init__(self, folder: Path, limits: Limits | None = None, key: str | None = None):
        """Raises `UserError` for a folder that cannot be made, or a key that is none."""
        self.folder, self.limits = folder, limits or Limits()
        self._cipher = _cipher(key) if key else None
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=OWNER_FOLDER)
            folder.chmod(OWNER_FOLDER)
        self._lock = FileLock(folder / ".lock", mode=OWNER_FILE)

    def append(self, rows: list[Row]) -> None:
        """Add rows, on disk when this returns; the oldest ones leave where there is no room."""
        lines = b"".join(self._encoded(row) for row in rows)
        with self._lock, disk_errors(self.folder):
            path = self._open_shard()
            with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, OWNER_FILE), "r+b") as file:
                file.seek(_whole(file))
                file.truncate()
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            self._prune()

    def rows(self, since: float = 0.0) -> Iterator[Row]:
        """All rows, the oldest first, but for files that were last written before `since` (Unix
        seconds). Raises `UserError` for lines that another key wrote."""
        for path in self.shards():
            if path.stat().st_mtime < since:
                continue
            for number, line in enumerate(_lines(path), 1):
                yield self._decoded(line, f"{path}:{number}")

    def shards(self) -> list[Path]:
        """The files, the oldest first."""
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.shards())

    def purge(self, unwanted: Callable[[Row], bool]) -> int:
        """Remove rows for good; how many."""
        gone = 0
        with self._lock, disk_errors(self.folder):
            for path in self.shards():
                lines = _lines(path)
                kept = [
                    line
                    for number, line in enumerate(lines, 1)
                    if not unwanted(self._decoded(line, f"{path}:{number}"))
                ]
                gone += len(lines) - len(kept)
                if not kept:
                    path.unlink()
                elif len(kept) < len(lines):
                    written = path.stat().st_mtime
                    with atomic_file(path) as temporary:
                        temporary.touch(mode=OWNER_FILE)
                        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
                        os.utime(temporary, (written, written))
        return gone

    def _open_shard(self) -> Path:
        """The file that takes rows now. Its age is that of its first row."""
        shards = self.shards()
        if shards:
            last, size = shards[-1], shards[-1].stat().st_size
            full = size > self.limits.max_mib * 2**20 / SHARD_SHARE
            first = next(iter(_lines(last, 1)), None)
            old = first is not None and self._age(self._decoded(first, str(last))) > (
                self.limits.max_days * 86400 / SHARD_SECONDS_SHARE
            )
            if not full and not old:
                return last
        number = int(shards[-1].stem) + 1 if shards else 1
        return self.folder / f"{number:06d}.jsonl"

    def _prune(self) -> None:
        """Drop the oldest files that are too many, or whose last row is too old."""
        shards = self.shards()
        sizes = [path.stat().st_size for path in shards]
        room = self.limits.max_mib * 2**20
        for path, size in zip(shards[:-1], sizes, strict=False):
            old = time.time() - path.stat().st_mtime > self.limits.max_days * 86400
            if sum(sizes) <= room and not old:
                return
            path.unlink()
            sizes.remove(size)

    @staticmethod
    def _age(row: Row) -> float:
        return time.time() - datetime.fromisoformat(row["time"]).timestamp()

    def _encoded(self, row: Row) -> bytes:
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
        return (self._cipher.encrypt(line) if self._cipher else line) + b"\n"

    def _decoded(self, line: bytes, where: str) -> Row:
        try:
            plain = self._cipher.decrypt(line) if self._cipher else line
            row: Row = json.loads(plain)
        except Exception:  # an InvalidToken, or bytes that are no JSON
            raise UserError(
                "cannot be read" + (" with this key" if self._cipher else ""),
                where=where,
                hint=f"is it encrypted, with another key? The key stands in {KEY}",
            ) from None
        return row


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _cipher(key: str) -> Any:
    from cryptography.fernet import Fernet

    try:
        return Fernet(key)
    except ValueError:
        raise UserError(
            f"what {KEY} holds is no key",
            hint="`python -c 'from cryptography.fernet import Fernet; "
            "print(Fernet.generate_key().decode())'` makes one",
        ) from None


def _lines(path: Path, most: int | None = None) -> list[bytes]:
    """The whole lines of a file; what a writer has not finished does not count."""
    found: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or (most is not None and len(found) == most):
                break
            found.append(line[:-1])
    return found


def _whole(file: Any) -> int:
    """Where the last whole line of an open file ends."""
    end = int(file.seek(0, os.SEEK_END))
    while end:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + int(found) + 1
        end = start
    return 0
