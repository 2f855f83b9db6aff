"""Hashes of files and models, kept on disk: weights are read once, not once a command.

What is kept belongs to a path, size, inode and the times of its last changes; a file that differs
in any of these is read anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from drafts.errors import UserError
from drafts.files import atomic_file, cache_folder, weight_files

LARGE = 1 << 20  # bytes; a smaller file is read as fast as its kept hash
SETTLED = 2.0  # seconds: a file changed later might change again within one tick of its clock


def hash_model(folder: Path) -> str:
    """SHA-256 over a model folder's config and weights: what makes it *this* model."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *weight_files(folder)]):
        digest.update(f"{path.name}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex: the kept one where the file has not changed since.

    Raises `UserError` where there is no such file.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        raise UserError("no such file", where=path, hint="check the path") from None
    if state.st_size < LARGE:
        return read_hash(path)
    identity = [str(path.resolve()), *(getattr(state, f"st_{name}") for name in IDENTITY)]
    name = hashlib.sha256(json.dumps(identity).encode("utf-8", "surrogatepass")).hexdigest()
    kept = cache_folder() / "hashes" / name[:2] / name
    if (found := read_kept(kept, identity)) is not None:
        return found
    settled = time.time() - max(state.st_mtime, state.st_ctime) > SETTLED
    value = read_hash(path)
    if settled:
        keep(kept, identity, value)
    return value


IDENTITY = ("size", "ino", "mtime_ns", "ctime_ns")


def read_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_kept(kept: Path, identity: list[object]) -> str | None:
    """The hash kept of the file of this identity, None for none."""
    try:
        record = json.loads(kept.read_text(encoding="utf-8"))
        return str(record["sha256"]) if record["file"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(kept: Path, identity: list[object], value: str) -> None:
    """Keep a hash; where the cache cannot be written, the next command reads the file again."""
    try:
        with atomic_file(kept) as temporary:
            temporary.write_text(json.dumps({"file": identity, "sha256": value}) + "\n")
    except (OSError, UserError):
        pass
