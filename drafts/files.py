"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from drafts.errors import UserError

TEXTS = (".json", ".txt", ".model", ".jinja")  # a model's files beside its weights
PAPERS = re.compile(r"licen[cs]e|notice|readme|copying|copyright|authors|use[-_]policy", re.I)
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the block ends without an error.

    What writers of `path` that were killed have left is removed first.
    """
    make_folder(path.parent)
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            yield temporary
            _sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; it replaces `path` when the block ends without an error."""
    make_folder(path.parent)
    remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            old = temporary.with_suffix(".old")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` where it is not there yet: whole, and by one process at a time."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with disk_errors(folder), FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():  # no other process made it while this one waited
                with atomic_folder(folder) as temporary:
                    make(temporary)
    return folder


def require_writable(folder: Path) -> None:
    """Raise `UserError` where `folder` could not be made or written. Makes nothing."""
    whole = folder.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not there.is_dir():
        raise UserError("is a file", where=there, hint="choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError("cannot be written", where=there, hint="choose another --out")


def make_folder(folder: Path) -> None:
    """Make `folder` where there is none. Raises `UserError` where none can be."""
    try:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file in its place, or a file system that makes no folders
        raise UserError(
            f"this folder cannot be made ({error.strerror})",
            where=folder,
            hint="choose another --out",
        ) from None


def require_empty(folder: Path) -> None:
    """Raise `UserError` where `folder` holds anything already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("is there already", where=folder, hint="choose another --out, or remove it")


def remove_leftovers(path: Path) -> None:
    """Restore or remove what a killed replacement of `path` left beside it."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(old|tmp)")
    found = [(one, match) for one in path.parent.glob(".*") if (match := name.fullmatch(one.name))]
    olds = sorted(one for one, match in found if match[2] == "old")
    if olds and not path.exists():  # killed between the two renames: the old one is still whole
        olds.pop().rename(path)
    for stale, match in found:
        owner = int(match[1])
        if stale.exists() and (owner == os.getpid() or not psutil.pid_exists(owner)):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(
                missing_ok=True
            )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a `UserError` that names `path`."""
    try:
        yield
    except Exception as error:
        code = _os_error(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "the disk is full", where=path, hint="free some space and run the command again"
            ) from error
        if code in (errno.EACCES, errno.EROFS):
            raise UserError(
                f"cannot be written ({os.strerror(code)})", where=path, hint="choose another folder"
            ) from error
        raise


def _os_error(error: Exception) -> int | None:
    """The operating system's code; safetensors raises an error of its own with it in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a `UserError` with the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=path, hint="check the path") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"is not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}",
            hint="repair the file or fetch it again",
        ) from None
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", where=path, hint="fetch the file again") from None


def shown_path(text: str) -> str:
    """A path, or NAME=PATH, as a reader likes it: from here or from ~; other text as it is."""
    before, equals, path = text.rpartition("=")
    if not path.startswith("/"):
        return text
    for folder, start in ((Path.cwd(), ""), (Path.home(), "~/")):
        if Path(path).is_relative_to(folder) and Path(path) != folder:
            return f"{before}{equals}{start}{Path(path).relative_to(folder)}"
    return text


def weight_files(folder: Path) -> list[Path]:
    """A model folder's safetensors files, by name: those of its index, else all. [] for none.

    vLLM ignores the others beside an index too. Raises `UserError` for a missing shard, and where
    transformers would read another file than the index says.
    """
    there = {path.name: path for path in Path(folder).glob("*.safetensors")}
    index = Path(folder) / INDEX
    if index.exists():
        wanted = set(read_index(index).values())
        if WHOLE in there and WHOLE not in wanted:
            raise UserError(
                f"holds {WHOLE} and an index of other files: vLLM reads those of the index, "
                f"transformers {WHOLE}",
                where=folder,
                hint=f"remove {WHOLE} or {INDEX}, whichever is not the model",
            )
    else:
        wanted = set(there)
        for shard in filter(None, map(SHARD.fullmatch, there)):
            stem, _, total = shard.groups()
            numbers = range(1, int(total) + 1)
            wanted |= {f"{stem}-{n:0{len(total)}}-of-{total}.safetensors" for n in numbers}
    if missing := sorted(wanted - there.keys()):
        raise UserError(
            f"lacks {', '.join(missing[:4])}{' ...' if missing[4:] else ''}: "
            f"{len(missing)} of the model's {len(wanted)} files",
            where=folder,
            hint="copy or download the missing files",
        )
    return [there[name] for name in sorted(wanted)]


def read_index(path: Path) -> dict[str, str]:
    """An index's file name by tensor name. Raises `UserError` for anything else."""
    index = read_json(path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(name, str) and name == Path(name).name for name in files.values()
    ):
        raise UserError(
            "has no weight_map from tensors to files beside it",
            where=path,
            hint="save or download the model again",
        )
    return files


def cache_folder() -> Path:
    """Where afaspec keeps what it can make again: `AFASPEC_CACHE`, else the user's cache folder."""
    if path := os.environ.get("AFASPEC_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "afaspec"
