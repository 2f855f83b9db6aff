"""Writing a draft in another layout of its family: config fields and tensor names change.

Tensors keep their bytes and their order. What the new layout has no place for is kept in a record
beside it, so that the way back gives the first checkpoint again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from drafts.checkpoint.family import Family
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import INDEX, atomic_folder, read_json, require_empty, weight_files, write_json
from drafts.registry import FAMILIES, read_draft
from drafts.target import TargetInfo
from drafts.tensors import open_tensors

RECORD = "afaspec-convert.json"
WRITTEN_ANEW = ("config.json", RECORD)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
IDENTITY = ("folder", "format", "config", "warnings")

Path_ = tuple[str, ...]


def convert(
    draft: DraftInfo, layout: str, out: Path, target: TargetInfo | None = None
) -> DraftInfo:
    """Write `draft` to the new folder `out` in another layout of its family, and describe it.

    `target` is named in layouts that have a place for it. Raises `UserError` for a layout that the
    family has not, and for a draft that it cannot hold.
    """
    family = FAMILIES[draft.family]
    check_layout(family, draft, layout)
    require_empty(out)
    raw = read_json(draft.folder / "config.json")
    record = read_record(draft.folder, draft.format, layout)
    made = family.to_layout(draft, raw, layout)
    stored = open_tensors(draft.folder).headers
    names = {old: record["names"].get(old) or made.rename(old) for old in stored}
    config = changed(made.config, record)
    if target is not None and "speculators_config" in config:
        config["speculators_config"]["verifier"] = {
            "architectures": read_json(target.folder / "config.json").get("architectures", []),
            "name_or_path": str(target.folder),
        }
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", config)
        copy_files(draft.folder, folder, names)
        written = read_draft(folder)
        check_same(draft, written)
        back = family.to_layout(written, config, draft.format)
        kept = {
            **differences(back.config, raw),
            "names": {new: old for old, new in names.items() if back.rename(new) != old},
        }
        if any(kept.values()):
            write_json(folder / RECORD, {"from": draft.format, "to": layout, **kept})
    return read_draft(out)


def check_layout(family: Family, info: DraftInfo, layout: str) -> None:
    if len(family.formats) == 1:
        raise UserError(
            f"is a draft of the family {family.title}, which has one layout only "
            f"({family.formats[0]})",
            where=info.folder,
            hint="use it as it is",
        )
    if layout not in family.formats:
        raise UserError(
            f"layout {layout!r} is unknown for the family {family.title}",
            hint=f"give --to {' or '.join(f for f in family.formats if f != info.format)}",
        )
    if layout == info.format:
        raise UserError(f"has the layout {layout} already", where=info.folder, hint="copy it")


def check_same(before: DraftInfo, after: DraftInfo) -> None:
    """Raise `UserError` unless the written draft is the one that was read, but for its layout."""
    for field in fields(DraftInfo):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if field.name not in IDENTITY and old != new:
            raise UserError(
                f"cannot be written as {after.format}: {field.name} {old} would become {new}",
                where=before.folder,
                hint="keep it in its layout",
            )


def read_record(draft: Path, layout: str, wanted: str) -> dict[str, Any]:
    """What an earlier conversion from `wanted` to `layout` kept; nothing when there was none."""
    if (draft / RECORD).exists():
        record: dict[str, Any] = read_json(draft / RECORD)
        if (record.get("from"), record.get("to")) == (wanted, layout):
            return record
    return {"set": [], "drop": [], "names": {}}


def differences(start: dict[str, Any], goal: dict[str, Any]) -> dict[str, Any]:
    """The changes that make `start` equal to `goal`, for `changed`."""
    old, new = dict(leaves(start)), dict(leaves(goal))
    return {
        "set": [[list(at), v] for at, v in new.items() if at not in old or old[at] != v],
        "drop": [list(at) for at in old if at not in new],
    }


def changed(config: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A copy of `config` with the record's changes."""
    flat = dict(leaves(config))
    for at in record["drop"]:
        flat.pop(tuple(at), None)
    flat |= {tuple(at): value for at, value in record["set"]}
    result: dict[str, Any] = {}
    for at, value in flat.items():
        inner = result
        for key in at[:-1]:
            inner = inner.setdefault(key, {})
        inner[at[-1]] = value
    return result


def leaves(config: dict[str, Any], at: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value of a nested config that is no filled object, with the keys that lead to it."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def copy_files(draft: Path, folder: Path, names: dict[str, str]) -> None:
    """Copy the files of the checkpoint but its config and record, the tensors renamed."""
    weights = weight_files(draft)
    for path in sorted(draft.iterdir()):
        if path in weights:
            rename_tensors(path, folder / path.name, names.__getitem__)
        elif path.name == INDEX:
            index = read_json(path)
            index["weight_map"] = {names[k]: v for k, v in index["weight_map"].items()}
            write_json(folder / INDEX, index)
        elif path.is_file() and path.suffix not in WEIGHTS and path.name not in WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)


def rename_tensors(source: Path, destination: Path, rename: Callable[[str], str]) -> None:
    """Copy a safetensors file with other tensor names: same order, same metadata, same data."""
    with source.open("rb") as file, destination.open("wb") as new:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        renamed = {n if n == "__metadata__" else rename(n): entry for n, entry in header.items()}
        text = json.dumps(renamed, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data stays aligned
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, new, 1 << 20)
