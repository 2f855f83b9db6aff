"""Writing a draft in another layout of its family: config fields and tensor names change.

Tensors keep their bytes and their order. What the new layout has no place for, and what it needed
besides, is kept in a record beside it, so that the way back gives the first checkpoint again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from drafts.checkpoint.family import Family
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.speculators import SPECULATORS, lacking, tensor_to_add, verifier
from drafts.errors import UserError
from drafts.files import (
    INDEX,
    atomic_folder,
    make_folder,
    read_json,
    require_empty,
    weight_files,
    write_json,
)
from drafts.pickles import MASK_EMBEDDING, load_mask_embedding, unpickle
from drafts.registry import FAMILIES, module_names, read_draft
from drafts.rewrite import Place, hash_tensor, rewrite
from drafts.target.info import TargetInfo
from drafts.target.weights import load_embedding
from drafts.tensors import PICKLES, Header, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEEP = "keep it in its layout, which vLLM serves"
RECORD = "afaspec-convert.json"
WRITTEN_ANEW = ("config.json", RECORD)
WEIGHTS = (".safetensors", *PICKLES)
IDENTITY = ("folder", "format", "config", "shared", "warnings")
NOTHING_KEPT: dict[str, Any] = {
    "set": [],
    "drop": [],
    "left_out": [],
    "names": {},
    "shapes": {},
    "added": {},
}

Path_ = tuple[str, ...]


def convert(
    draft: DraftInfo, layout: str, out: Path, target: TargetInfo | None = None
) -> DraftInfo:
    """Write `draft` to the new folder `out` in another layout of its family, and describe it.

    speculators' layout names the target and holds what the draft shares with it. Raises `UserError`
    for a layout that the family has not, for a draft that it cannot hold, and where it needs a
    target that is not given.
    """
    family = FAMILIES[draft.family]
    check_layout(family, draft, layout)
    require_empty(out)
    raw = read_json(draft.folder / "config.json")
    found = read_record(draft.folder, draft.format, layout)
    record = found or NOTHING_KEPT
    made = family.to_layout(draft, raw, layout)
    if made.hindrances:
        raise UserError(
            f"cannot be written as {layout}, where there is no draft that "
            f"{' and '.join(made.hindrances)}",
            where=draft.folder,
            hint=KEEP,
        )
    config = changed(made.config, record)
    added: dict[str, Tensor] = {}
    if layout == SPECULATORS:
        names = set(module_names(draft).values())
        wanted = lacking(draft, names) if found is None else record["left_out"]
        added = {name: tensor_to_add(name, draft, target) for name in wanted if name not in names}
        if target is not None:
            config["speculators_config"]["verifier"] = verifier(draft, target, made.replaced)
    stored = open_tensors(draft.folder).headers
    gone = unchanged(stored, record["added"])
    places = {}
    for old, header in stored.items():
        if old not in gone:
            name = record["names"].get(old) or made.rename(old)
            shape = record["shapes"].get(name) or made.shapes.get(name) or header.shape
            places[old] = Place(name, tuple(shape))
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", config)
        copy_files(draft.folder, folder, places, added)
        written = read_draft(folder)
        check_same(draft, written)
        back = family.to_layout(written, config, draft.format)
        headers = open_tensors(folder).headers
        kept = {
            **differences(back.config, raw),
            "names": {new.name: old for old, new in places.items() if back.rename(new.name) != old},
            "shapes": {
                old: list(stored[old].shape)
                for old, new in places.items()
                if new.shape != stored[old].shape
            },
            "added": {name: hash_tensor(headers[name].file, name) for name in added},
            "left_out": sorted(gone),
        }
        if any(kept.values()):
            write_json(folder / RECORD, {"from": draft.format, "to": layout, **kept})
    return read_draft(out)


def place_mask_embedding(folder: Path, out: Path, target: TargetInfo | None) -> DraftInfo:
    """Write the DFlash draft in `folder` to `out`, its mask_embedding.pt as a row of an embedding.

    vLLM takes the row of the mask token from there as it would from the file. The rest of the
    embedding is the draft's, or the `target`'s. Raises `UserError` where neither is there.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = folder / MASK_EMBEDDING
    raw, stored = read_json(folder / "config.json"), open_tensors(folder)
    token = (raw.get("dflash_config") or {}).get("mask_token_id", raw.get("mask_token_id"))
    if not isinstance(token, int):
        raise UserError("names no mask_token_id", where=folder / "config.json", hint=KEEP)
    row = load_mask_embedding(path, token)
    name = next((n for n in stored.headers if n.endswith("embed_tokens.weight")), None)
    if name is None and target is None:
        raise UserError(
            f"keeps its mask token's embedding in {MASK_EMBEDDING}, and has no other: the target's "
            "is to stand around it",
            where=folder,
            hint="give --target TARGET as well",
        )
    table = stored.load(name) if name else load_embedding(cast(TargetInfo, target))
    if row.shape[0] != table.shape[1] or not 0 <= token < len(table):
        raise UserError(
            f"holds {row.shape[0]} values for token {token}, the embedding is {list(table.shape)}",
            where=path,
            hint="give the target that the draft was made for",
        )
    table[token] = row.to(table.dtype)
    require_empty(out)
    with atomic_folder(out) as made:
        last = weight_files(folder)[-1]
        held = stored.headers[name].file if name else last
        for file in folder.iterdir():
            if file.is_file() and file not in (path, held):
                shutil.copyfile(file, made / file.name)
        with safe_open(held, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        added = name or "embed_tokens.weight"
        save_file(tensors | {added: table.contiguous()}, made / held.name, metadata=metadata)
        if (made / INDEX).exists():
            index = read_json(made / INDEX)
            index["weight_map"][added] = held.name
            write_json(made / INDEX, index)
        read_draft(made)
    return read_draft(out)


def convert_pickles(
    folder: Path, layout: str | None, out: Path, target: TargetInfo | None = None
) -> DraftInfo:
    """Write the draft in `folder`, of which there are pickles alone, with safetensors to `out`.

    `layout` None keeps the layout. Raises `UserError` as `convert` does, for pickles that hold more
    than tensors, and where tensors and config are no draft.
    """
    require_empty(out)
    make_folder(out.parent)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
        plain = Path(made) / "plain"
        try:
            with atomic_folder(plain) as temporary:
                unpickle(folder, temporary)
            draft = read_draft(plain)
            if layout not in (None, draft.format):
                return convert(draft, layout, out, target)
        except UserError as error:  # what is wrong with the copy is wrong with the draft
            where = str(error.where).replace(str(plain), str(folder))
            raise UserError(error.problem, where=where, hint=error.hint) from None
        plain.rename(out)
    return read_draft(out)


def unchanged(stored: Mapping[str, Header], added: Mapping[str, str]) -> set[str]:
    """Which tensors are as an earlier conversion `added` them, by the hashes of their bytes."""
    return {
        name
        for name, digest in added.items()
        if name in stored and hash_tensor(stored[name].file, name) == digest
    }


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
                hint=KEEP,
            )


def read_record(draft: Path, layout: str, wanted: str) -> dict[str, Any] | None:
    """What an earlier conversion from `wanted` to `layout` kept; None when there was none."""
    if (draft / RECORD).exists():
        record: dict[str, Any] = read_json(draft / RECORD)
        if (record.get("from"), record.get("to")) == (wanted, layout):
            return NOTHING_KEPT | record
    return None


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


def copy_files(
    draft: Path, folder: Path, places: Mapping[str, Place], added: Mapping[str, Tensor]
) -> None:
    """Copy the files of the checkpoint but its config and record, the tensors to their places.

    Added tensors go to the last file of tensors.
    """
    files = weight_files(draft)
    for path in files:
        rewrite(path, folder / path.name, places, added if path == files[-1] else {})
    for path in sorted(draft.iterdir()):
        if path.name == INDEX:
            index = read_json(path)
            stored = index["weight_map"].items()
            index["weight_map"] = {places[k].name: v for k, v in stored if k in places}
            index["weight_map"] |= dict.fromkeys(added, files[-1].name)
            write_json(folder / INDEX, index)
        elif path.is_file() and path.suffix not in WEIGHTS and path.name not in WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)
