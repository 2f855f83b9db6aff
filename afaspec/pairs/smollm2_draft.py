"""`smollm2-draft`: an EAGLE-3 draft of SmolLM2 that ships without what its target has too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afaspec.embedded.unpack import ASSETS, SMOLLM2_DRAFT, pack, unpack
from afaspec.pairs.smollm2 import open_smollm2
from drafts.checkpoint.info import DraftInfo
from drafts.target.info import TargetInfo, read_target
from drafts.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head.weight"
BITS = 8
LARGEST = 16 * 10**6  # bytes of the packed draft


def open_smollm2_draft(assets: Path = ASSETS) -> Path:
    """The draft's folder in the cache, unpacked there if need be; needs the target's package."""
    target = None if has_head(assets / SMOLLM2_DRAFT) else read_target(open_smollm2())
    return unpack_draft(assets, target)


def pack_draft(draft: DraftInfo, asset: Path, target: TargetInfo) -> int:
    """Write `draft` packed to `asset`, without its output layer where that is the target's rows.

    Returns the bytes of its weights. Raises `UserError` for one that cannot ship.
    """
    tensors = open_tensors(draft.folder)
    kept = tensors.load("d2t") if "d2t" in tensors.headers else None
    rows = None if kept is None else head_rows(kept, target)
    same = rows is not None and tensors.load(HEAD).to(rows.dtype).equal(rows)
    without = frozenset({HEAD}) if same else frozenset()
    return pack(draft.folder, asset, BITS, LARGEST, without)


def unpack_draft(assets: Path, target: TargetInfo | None) -> Path:
    """The draft of `assets` in the cache; `target` gives the output layer where it has none."""

    def add(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {} if target is None else {HEAD: head_rows(state["d2t"], target)}

    return unpack(SMOLLM2_DRAFT, assets, add)


def has_head(asset: Path) -> bool:
    """Whether a packed draft brings an output layer of its own; True where there is no draft."""
    if not (asset / "model.safetensors").is_file():
        return True
    return any(name.startswith(HEAD) for name in open_tensors(asset).headers)


def head_rows(d2t: Tensor, target: TargetInfo) -> Tensor:
    """The rows [draft vocabulary, d] of the target's output layer that d2t keeps."""
    import torch

    from drafts.target.head import load_lm_head

    return load_lm_head(target)[torch.arange(len(d2t)) + d2t].to(torch.bfloat16)
