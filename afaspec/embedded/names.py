"""The shipped pair, unpacked once into a cache folder."""

from __future__ import annotations

from pathlib import Path

from drafts.errors import UserError

NAMES = {"embedded": "target", "embedded-draft": "draft"}


def model_folder(path: Path) -> Path:
    """`path`, or the unpacked folder where it is the name of an embedded model."""
    return resolve_model(str(path)) if str(path) in NAMES else path


def resolve_model(name_or_path: str) -> Path:
    """`embedded` and `embedded-draft` mean the shipped pair; anything else is a folder."""
    if name_or_path in NAMES:
        from afaspec.embedded.unpack import unpack

        return unpack(NAMES[name_or_path])
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        raise UserError(
            "no such model folder",
            where=path,
            hint="give a folder with config.json and .safetensors files, or `embedded`",
        )
    return path
