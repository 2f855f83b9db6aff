"""Refusals before any model loads: does this store fit this draft and this target?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afaspec.manifest import Manifest
from drafts.checkpoint import DraftInfo, wanted_layer_ids
from drafts.errors import UserError
from drafts.target import TargetInfo

if TYPE_CHECKING:
    from torch import nn


def check_fit(manifest: Manifest, store: Path, draft: DraftInfo, target: TargetInfo) -> None:
    """Raise `UserError` for the first way in which store, draft and target do not fit."""
    if draft.sha256 == target.sha256:
        raise UserError(
            "is the target itself", where=draft.folder, mend="give a draft, not the target"
        )
    captured_hash = manifest.target["sha256"]
    again = f"capture again: afaspec capture {target.folder} PROMPTS --draft {draft.folder}"
    if captured_hash != target.sha256:
        raise UserError(
            f"was captured from another target (hash {captured_hash[:12]}, "
            f"{target.folder} has {target.sha256[:12]})",
            where=store,
            mend=f"give the target it was captured from, or {again}",
        )
    if draft.vocab_size != target.vocab_size:
        raise UserError(
            f"is a draft of another target: its vocabulary has {draft.vocab_size} tokens, "
            f"the target's {target.vocab_size}",
            where=draft.folder,
            mend="use a draft that was trained for this target",
        )
    if draft.reads != "nothing" and draft.target_hidden_size != target.hidden_size:
        raise UserError(
            f"is a draft of another target: it expects hidden size {draft.target_hidden_size}, "
            f"the target has {target.hidden_size}",
            where=draft.folder,
            mend="use a draft that was trained for this target",
        )
    wanted = wanted_layer_ids(draft, target)
    if wanted and tuple(manifest.layer_ids) != wanted:
        raise UserError(
            f"holds layers {list(manifest.layer_ids)}, the draft reads {list(wanted)}",
            where=store,
            mend=again,
        )
    if "embed_tokens.weight" in draft.shared and draft.hidden_size != target.hidden_size:
        raise UserError(
            f"has no embedding of its own, and hidden size {draft.hidden_size} differs from "
            f"the target's {target.hidden_size}",
            where=draft.folder,
            mend="use a draft checkpoint that includes embed_tokens.weight",
        )


def check_stored(draft: nn.Module, info: DraftInfo) -> None:
    """Raise `UserError` unless all that trains is the draft's own, not shared with the target."""
    own = {name for name, parameter in draft.named_parameters() if parameter.requires_grad}
    trained = {name.split(".lora_")[0].removesuffix(".weight") for name in own}
    if foreign := sorted(trained & {name.removesuffix(".weight") for name in info.shared}):
        raise UserError(
            f"shares {foreign[0]} with the target, so that it cannot be trained",
            where=info.folder,
            mend=f"leave {foreign[0]} out (no --lm-head)",
        )
