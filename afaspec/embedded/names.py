"""The shipped pair by name, unpacked once into a cache folder."""

from __future__ import annotations

from pathlib import Path

from afaspec.embedded.unpack import unpack
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.registry import read_draft

NAMES = {"embedded": "target", "embedded-draft": "draft"}


def open_draft(name_or_path: str | Path) -> DraftInfo:
    """The draft of that name or folder. Raises `UserError` for what is none."""
    return read_draft(_folder(name_or_path))


def resolve_model(name_or_path: str | Path) -> Path:
    """`embedded` and `embedded-draft` mean the shipped pair; anything else is a folder."""
    folder = _folder(name_or_path)
    if not folder.is_dir():
        raise UserError(
            "no such model folder",
            where=folder,
            hint="give a folder with config.json and .safetensors files, or `embedded`",
        )
    return folder


def _folder(name_or_path: str | Path) -> Path:
    if str(name_or_path) in NAMES:
        return unpack(NAMES[str(name_or_path)])
    return Path(name_or_path).expanduser()
