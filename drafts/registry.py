"""The draft families, and what can be done with a draft of any: read, load, start, write.

A checkpoint is a config.json and safetensors files. What is written has the layout that was read:
the base draft's config byte for byte, its tensor names, dtypes and order.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_ids import default_layer_ids
from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError
from drafts.families.dflash.layouts import DFlash
from drafts.families.eagle.layouts import Eagle
from drafts.families.eagle3.layouts import Eagle3
from drafts.families.lm.layouts import DraftModel
from drafts.families.medusa.layouts import Medusa
from drafts.families.peagle.layouts import PEagle
from drafts.files import PAPERS, TEXTS, read_json, weight_files, write_json
from drafts.target import TargetInfo
from drafts.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        PEagle(),  # before EAGLE-3, whose architecture name its checkpoints may carry
        Eagle3(),
        Eagle(),
        Medusa(),
        DFlash(),
        DraftModel(),  # last: what is no draft head may still be a model of its own
    )
}


def read_draft(folder: Path) -> DraftInfo:
    """Describe the draft in `folder` from its config and tensor headers. Raises `UserError`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            "no such folder", where=folder, hint="give the folder of a draft checkpoint"
        )
    source = Source(folder, read_json(folder / "config.json"), open_tensors(folder).headers)
    family = next((family for family in FAMILIES.values() if family.matches(source)), None)
    if family is None:
        named = source.raw.get("speculators_model_type") or source.raw.get("architectures")
        raise UserError(
            f"is no draft that afaspec knows: its config says {named}",
            where=folder / "config.json",
            hint=f"give a draft of one of {', '.join(f.title for f in FAMILIES.values())}",
        )
    return family.describe(source)


def wanted_layer_ids(draft: DraftInfo, target: TargetInfo) -> tuple[int, ...]:
    """The target's layers that the draft reads, vLLM's default where its config names none."""
    return default_layer_ids(target.num_layers) if draft.layer_ids is None else draft.layer_ids


def load_draft(draft: DraftInfo, target: TargetInfo | None = None) -> Draft:
    """Load the draft in float32. What it does not store itself, it takes from the target."""
    return FAMILIES[draft.family].load(draft, target)


def init_draft(family: str, target: TargetInfo, options: InitOptions | None = None) -> Draft:
    """A seeded random draft of `family` for `target`; its output layer starts as the target's."""
    import torch

    if family not in FAMILIES:
        raise UserError(
            f"family {family!r} is unknown", hint=f"choose one of {', '.join(sorted(FAMILIES))}"
        )
    options = options or InitOptions()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return FAMILIES[family].init(target, options)


def module_names(draft: DraftInfo) -> dict[str, str]:
    """The module's parameter name of each stored tensor, by its stored name."""
    rename = FAMILIES[draft.family].module_name
    return {name: rename(name) for name in open_tensors(draft.folder).headers}


def write_like(base: DraftInfo, folder: Path, changed: dict[str, Tensor]) -> None:
    """Write `base`'s checkpoint to the empty `folder` with the `changed` tensors (module names).

    Changed tensors are stored in the base's dtype; every other byte of the base is kept, its
    licence, notices and model card included.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    names, left = module_names(base), dict(changed)
    for path in weight_files(base.folder):
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
        raise UserError(
            f"has no tensor for {', '.join(sorted(left))}", where=base.folder, hint=FETCH
        )
    for path in base.folder.iterdir():
        if path.is_file() and (path.suffix in TEXTS or PAPERS.match(path.name)):
            shutil.copyfile(path, folder / path.name)


def save_draft(draft: Draft, family: str, folder: Path, *, dtype: Any) -> None:
    """Write `draft` to the empty `folder` in its family's first layout, as vLLM loads it."""
    from safetensors.torch import save_file

    config, tensors = FAMILIES[family].dump(draft, dtype)
    write_json(folder / "config.json", config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
