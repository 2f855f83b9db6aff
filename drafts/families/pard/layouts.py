"""PARD checkpoints: a causal LM as transformers saves it, whose config names its mask token.

AMD's drafts call the token `pard_token`; vLLM also takes `ptd_token_id`, and before both of them
`mask_token_id`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.layer_config import target_window
from drafts.checkpoint.mask_token import MASK_TOKEN, check_mask_token, init_mask_token, mask_token
from drafts.checkpoint.source import Source
from drafts.errors import UserError
from drafts.families.lm.layouts import PROBE_TOLERANCE, DraftModel, load_lm, set_window
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.pard.module import PardDraft

OWN_NAMES = ("pard_token", "ptd_token_id")
SECOND = (
    "it is a PARD-2 draft, adapted and served here without the target's hidden states (its "
    "target-independent mode): its warp_model.bin, a pickle that joins them, is not read"
)


class Pard(DraftModel):
    """The family of PARD drafts."""

    name = "pard"
    title = "PARD"

    def matches(self, source: Source) -> bool:
        """By its own names of the token alone: `mask_token_id` stands in other models' configs."""
        named = any(source.raw.get(name) is not None for name in OWN_NAMES)
        return named and super().matches(source)

    def describe(self, source: Source) -> DraftInfo:
        info = super().describe(source)
        field = next(name for name in MASK_TOKEN if source.raw.get(name) is not None)
        check_mask_token(source.raw[field], info.vocab_size, source.config_path, field)
        two = (SECOND,) if source.raw.get("spd_type") == "pard2" else ()
        warnings = (*info.warnings, *two)
        parallel = {"parallel_drafting": True}
        return replace(info, family="pard", speculation=parallel, warnings=warnings)

    def load(self, info: DraftInfo, target: TargetInfo | None) -> PardDraft:
        from drafts.families.pard.module import PardDraft

        draft = PardDraft(load_lm(info.folder), mask_token(info.config))
        set_window(draft.lm.config, info, target_window(target))
        check_blocks(draft, info)
        return draft

    def dump(self, draft: PardDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = super().dump(draft, dtype)
        named = any(name in config for name in OWN_NAMES)
        return config | ({} if named else {"pard_token": draft.mask_token_id}), tensors

    def init(self, target: TargetInfo, options: InitOptions) -> PardDraft:
        """As a draft model's, with the mask token of a fresh draft."""
        from drafts.families.pard.module import PardDraft

        return PardDraft(super().init(target, options).lm, init_mask_token(target))


def check_blocks(draft: PardDraft, info: DraftInfo) -> None:
    """Raise `UserError` unless rows drafted at once say what they say one at a time."""
    import torch

    from drafts.nn.packing import Packing

    ids = torch.arange(8) % info.vocab_size
    rows, steps = torch.tensor([2, 6]), 3
    masks = torch.full((steps - 1,), draft.mask_token_id)
    draft.eval()
    alike = True
    with torch.inference_mode():
        try:
            together = draft(torch.empty(8, 0), ids, steps, Packing((0, 8), rows))
        except NotImplementedError:
            alike, rows = False, rows[:0]
        for at, row in enumerate(rows.tolist()):
            text = torch.cat([ids[: row + 2], masks]).unsqueeze(0)
            expected = draft.lm(input_ids=text, use_cache=False).logits[0, -steps:]
            found = torch.stack([draft.logits(together[j][at], j) for j in range(steps)])
            alike &= bool((found - expected).abs().max() <= PROBE_TOLERANCE * expected.abs().max())
    draft.train()
    if not alike:
        raise UserError(
            f"{type(draft.lm).__name__} attends, or makes its logits, in a way that afaspec cannot "
            "draft in parallel with",
            where=info.folder,
            hint="use a PARD draft of another architecture",
        )
