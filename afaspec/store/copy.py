"""A feature store to or from any place that fsspec knows: a bucket, a server, another folder.

Shards are mapped into memory as they are trained on, so a store is copied to the machine first.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afaspec.store.manifest import NAME, Manifest, ShardRecord, read_manifest
from drafts.errors import UserError, first_line
from drafts.files import atomic_file, disk_errors
from drafts.hashes import hash_file

PIECE = 1 << 22  # bytes that are read at a time
# Beside the shards: prompts that the target has written, and what is known of them.
TEXTS = ("self_prompts.jsonl", "self_prompts.json", "self_prompts.drawn.jsonl")


@dataclass(frozen=True)
class Place:
    """A folder by its address, on a file system of fsspec's."""

    address: str
    files: Any  # fsspec's AbstractFileSystem
    folder: str

    @classmethod
    def of(cls, address: str) -> Place:
        """Raises `UserError` for a kind of address that this installation cannot open."""
        from fsspec.core import url_to_fs

        try:
            files, folder = url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot be opened ({first_line(error)})",
                where=address,
                hint="install what fsspec needs for it, such as s3fs or gcsfs",
            ) from None
        return cls(address, files, folder.rstrip("/"))

    @property
    def local(self) -> bool:
        return "file" in (self.files.protocol if self.files.protocol else ())

    def at(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None for one that is not there."""
        try:
            size: int | None = self.files.size(self.at(name))
        except FileNotFoundError as error:
            cause = error.__cause__  # a server that cannot be reached is told like this, too
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from None
            return None
        return size


def copy_store(
    source: str,
    to: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Copy the finished store at `source` to `to`; each is a folder or an address such as s3://b/x.

    Each shard's SHA-256 is compared on its way. The manifest comes last, so that a copy that was
    interrupted is no store yet, and the same call goes on with it. `on_progress` is told bytes.
    Raises `UserError` for a store that is not finished or was changed, and for another one there.
    """
    here, there = Place.of(source), Place.of(to)
    manifest = finished_manifest(here)
    check_free(there, manifest)
    with reachable(there):
        there.files.makedirs(there.folder, exist_ok=True)
    total, done = sum(shard.bytes for shard in manifest.shards), 0
    on_progress(0, total)
    for shard in manifest.shards:
        if not is_there(there, shard):
            for count in copy_shard(here, there, shard):
                on_progress(done + count, total)
        done += shard.bytes
        on_progress(done, total)
    for name in (*TEXTS, NAME):
        with reachable(here):
            content = here.files.cat_file(here.at(name)) if here.size(name) is not None else None
        if content is not None:
            put(there, name, content)
    return manifest


def manifest_at(place: Place) -> Manifest | None:
    """The manifest of the store in a place; None where there is no store."""
    with reachable(place), tempfile.TemporaryDirectory() as scratch:
        if place.size(NAME) is None:
            return None
        (Path(scratch) / NAME).write_bytes(place.files.cat_file(place.at(NAME)))
        return read_manifest(Path(scratch))


def finished_manifest(place: Place) -> Manifest:
    """The manifest of a finished store. `UserError` for none, or one that is still written."""
    manifest = manifest_at(place)
    if manifest is None:
        raise UserError(
            "is not a feature store: it has no manifest.json",
            where=place.address,
            hint="give the folder that afaspec capture wrote, or the place of a finished copy",
        )
    if not manifest.complete:
        raise UserError(
            f"is not finished: {manifest.sequences} sequences are there so far",
            where=place.address,
            hint="run the same afaspec capture again; it goes on where it stopped",
        )
    return manifest


def check_free(place: Place, manifest: Manifest) -> None:
    """Raise `UserError` where another store lies in this place."""
    found = manifest_at(place)
    before = [shard.sha256 for shard in found.shards] if found else []
    if before != [shard.sha256 for shard in manifest.shards][: len(before)]:
        raise UserError(
            "another store is there already",
            where=place.address,
            hint="choose another place; a store that has grown is copied over what it was",
        )


def is_there(place: Place, shard: ShardRecord) -> bool:
    """Whether this shard was copied before: by its size, and on this machine by its content."""
    with reachable(place):
        if place.size(shard.file) != shard.bytes:
            return False
        return not place.local or hash_file(Path(place.at(shard.file))) == shard.sha256


def copy_shard(source: Place, to: Place, shard: ShardRecord) -> Iterator[int]:
    """Copy one shard, yielding the bytes so far. `UserError` where it is not what it was."""
    digest, count = hashlib.sha256(), 0
    with reachable(to), to.files.open(to.at(shard.file), "wb") as writer:
        for piece in pieces(source, shard.file):
            writer.write(piece)
            digest.update(piece)
            count += len(piece)
            yield count
    if digest.hexdigest() != shard.sha256:
        with reachable(to):
            to.files.rm_file(to.at(shard.file))
        raise UserError(
            "this shard's content has changed since it was captured (its SHA-256 differs)",
            where=f"{source.address}/{shard.file}",
            hint="copy it again from where it was captured, or capture it again",
        )


def pieces(place: Place, name: str) -> Iterator[bytes]:
    """A file's content, piece by piece."""
    with reachable(place), place.files.open(place.at(name), "rb") as reader:
        while piece := reader.read(PIECE):
            yield piece


def put(place: Place, name: str, content: bytes) -> None:
    """Write a small file, whole or not at all where renaming is."""
    with reachable(place):
        if place.local:
            with atomic_file(Path(place.at(name))) as temporary:
                temporary.write_bytes(content)
        else:
            place.files.pipe_file(place.at(name), content)


@contextmanager
def reachable(place: Place) -> Iterator[None]:
    """Turn what a file system raises into a `UserError` that names the place."""
    try:
        with disk_errors(Path(place.folder)):
            yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"is not there ({first_line(error)})", where=place.address) from error
    except Exception as error:  # a library boundary: every cloud has exceptions of its own
        raise UserError(
            f"failed ({type(error).__name__}: {first_line(error)})",
            where=place.address,
            hint="check the address, the network and your credentials; the same command goes on",
        ) from error
