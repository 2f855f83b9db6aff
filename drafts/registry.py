"""Reading and writing draft checkpoints of every family and layout.

A checkpoint is a config.json and safetensors files. What is written has the layout that was read:
the base draft's config byte for byte, its tensor names, dtypes and order.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_ids import default_layer_ids
from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError
from drafts.families.dflash import layouts as dflash
from drafts.families.eagle import layouts as eagle
from drafts.families.eagle3 import layouts as eagle3
from drafts.families.lm import layouts as draft_model
from drafts.families.medusa import layouts as medusa
from drafts.families.peagle import layouts as peagle
from drafts.files import read_json, write_json
from drafts.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft
    from drafts.target import TargetInfo


__all__ = [
    "DraftInfo",
    "load_draft",
    "module_names",
    "read_draft_info",
    "save_draft",
    "wanted_layer_ids",
    "write_like",
]


def read_draft_info(folder: Path) -> DraftInfo:
    """Describe the draft in `folder` from its config and tensor headers. Raises `UserError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            "no such folder", where=folder, hint="give the folder of a draft checkpoint"
        )
    source = Source(folder, read_json(folder / "config.json"), open_tensors(folder).headers)
    family = family_of(source)
    if family is None:
        named = source.raw.get("speculators_model_type") or source.raw.get("architectures")
        raise UserError(
            f"is no draft that afaspec knows: its config says {named}",
            where=folder / "config.json",
            hint=f"give a draft of one of {', '.join(f.title for f in FAMILIES.values())}",
        )
    return family.describe(source)


def wanted_layer_ids(info: DraftInfo, target: TargetInfo) -> tuple[int, ...]:
    """The target's layers that the draft reads, vLLM's default where its config names none."""
    return default_layer_ids(target.num_layers) if info.layer_ids is None else info.layer_ids


def load_draft(folder: Path, target_folder: Path | None = None) -> Draft:
    """Load the draft in float32. What it does not store itself, it takes from the target."""
    info = read_draft_info(folder)
    return FAMILIES[info.family].load(info, target_folder)


def module_names(info: DraftInfo) -> dict[str, str]:
    """The module's parameter name of each stored tensor, by its stored name."""
    rename = FAMILIES[info.family].module_name
    return {name: rename(name) for name in open_tensors(info.folder).headers}


def write_like(base: Path, folder: Path, changed: dict[str, Tensor]) -> None:
    """Write `base`'s checkpoint to the empty `folder` with the `changed` tensors (module names).

    Changed tensors are stored in the base's dtype; every other byte of the base is kept.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = module_names(read_draft_info(base))
    left = dict(changed)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not any(names[name] in left for name in tensors):
            shutil.copyfile(path, folder / path.name)
            continue
        for name, old in tensors.items():
            if names[name] in left:
                tensors[name] = left.pop(names[name]).to(old.dtype).contiguous()
        save_file(tensors, folder / path.name, metadata=metadata)
    if left:
        raise UserError(f"has no tensor for {', '.join(sorted(left))}", where=base, hint=FETCH)
    for path in base.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, folder / path.name)


def save_draft(draft: Draft, family: str, folder: Path, *, dtype: Any) -> None:
    """Write `draft` to the empty `folder` in its family's first layout, as vLLM loads it."""
    from safetensors.torch import save_file

    config, tensors = FAMILIES[family].dump(draft, dtype)
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        peagle.FAMILY,  # before EAGLE-3, whose architecture name its checkpoints may carry
        eagle3.FAMILY,
        eagle.FAMILY,
        medusa.FAMILY,
        dflash.FAMILY,
        draft_model.FAMILY,  # last: what is no draft head may still be a model of its own
    )
}


def family_of(source: Source) -> Family | None:
    """The family whose config and tensors these are; the first that says so."""
    return next((family for family in FAMILIES.values() if family.matches(source)), None)
