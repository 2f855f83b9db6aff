"""Models by name: the pairs that come with afaspec, kept in a cache folder, folders, hub ids."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from afaspec.embedded.unpack import unpack
from afaspec.pairs.smollm2 import open_smollm2
from afaspec.pairs.smollm2_draft import open_smollm2_draft
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.hub import fetch, folder_name, is_hub_id, source
from drafts.registry import read_draft

NAMES: dict[str, Callable[[], Path]] = {
    "embedded": partial(unpack, "target"),
    "embedded-draft": partial(unpack, "draft"),
    "smollm2": open_smollm2,
    "smollm2-draft": open_smollm2_draft,
}


def open_draft(name_or_path: str | Path) -> DraftInfo:
    """The draft of that name, folder or hub id. Raises `UserError` for what is none."""
    return read_draft(_folder(name_or_path))


def resolve_model(name_or_path: str | Path, *, pickles: bool = False) -> Path:
    """The folder of a model: one of `NAMES`, a folder, or `owner/name` or `owner/name@revision` on
    the hub where there is no such folder.

    `pickles` fetches those too, of models that are published so alone.
    """
    folder = _folder(name_or_path, pickles)
    if not folder.is_dir():
        raise UserError(
            "no such model folder",
            where=folder,
            hint="give a folder with config.json and .safetensors files, a hub id, `smollm2` or "
            "`embedded`",
        )
    return folder


def served_name(name_or_path: str | Path, adapter: Path | None = None) -> str:
    """What a server calls a target: name, hub id or folder's name, with `+` its adapter's."""
    text = str(name_or_path)
    if text in NAMES or is_hub_id(text):
        name = text.partition("@")[0]
    else:
        name = folder_name(Path(text).expanduser())
    return name if adapter is None else f"{name}+{folder_name(adapter.expanduser())}"


def pinned(name: str) -> str:
    """`name`, with the commit that it means now where it is on the hub."""
    return source(_folder(name)) or name if is_hub_id(name) else name


def _folder(name_or_path: str | Path, pickles: bool = False) -> Path:
    text = str(name_or_path)
    if text in NAMES:
        return NAMES[text]()
    if is_hub_id(text):
        return fetch(text, pickles=pickles)
    folder = Path(text).expanduser()
    if not folder.exists() and (recorded := source(folder)):  # the hub's cache was emptied
        return fetch(recorded, pickles=pickles)
    return folder
