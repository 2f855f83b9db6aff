"""P-EAGLE checkpoints: an EAGLE-3 layout with a `mask_hidden` tensor and a mask token.

The layout of EAGLE keeps EAGLE-3's architecture name and names the token `pard_token` (or
`mask_token_id`, `ptd_token_id`); speculators' is of type `peagle` and says `mask_token_id`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from drafts.checkpoint.family import InitOptions, Layout
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.load import fill
from drafts.checkpoint.mask_token import MASK_TOKEN, check_mask_token, init_mask_token, mask_token
from drafts.checkpoint.shapes import check_whole
from drafts.checkpoint.source import FETCH, Source, is_speculators, open_source
from drafts.checkpoint.speculators import INNER
from drafts.errors import UserError
from drafts.families.eagle3.layouts import ARCHITECTURES as EAGLE3_ARCHITECTURES
from drafts.families.eagle3.layouts import UNUSED_NORM, Eagle3, config_of, shapes, shared_names
from drafts.target.info import TargetInfo
from drafts.tensors import Header, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.peagle.module import PEagleDraft


ARCHITECTURES = {"PEagleDraftModel", "PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM"}
MASK_HIDDEN = "mask_hidden"
USUAL_LAYERS = 2  # of a fresh draft: one layer alone gives the masked slots little to go on


class PEagle(Eagle3):
    """The family of P-EAGLE drafts."""

    name = "peagle"
    title = "P-EAGLE"
    outside: ClassVar[dict[str, bool]] = {"norm_before_residual": False, "norm_before_fc": False}

    def matches(self, source: Source) -> bool:
        if is_speculators(source):
            return bool(source.raw["speculators_model_type"] == "peagle")
        named = set(source.raw.get("architectures") or [])
        stored = map(self.module_name, source.headers)
        masked = mask_token(source.raw) is not None or MASK_HIDDEN in stored
        return bool(ARCHITECTURES & named) or (bool(EAGLE3_ARCHITECTURES & named) and masked)

    def describe(self, source: Source) -> DraftInfo:
        info = super().describe(source)
        field = "mask_token_id" if is_speculators(source) else "pard_token"
        check_mask_token(mask_token(info.config), info.vocab_size, source.config_path, field)
        return replace(info, family="peagle", speculation={"parallel_drafting": True})

    def check_tensors(self, source: Source, flat: dict[str, Any]) -> dict[str, Header]:
        """As EAGLE-3's, with `mask_hidden`."""
        size = shapes(flat)["fc.weight"][1]
        mask = {MASK_HIDDEN: mask_shape(source, size)}
        return check_whole(
            source,
            self.module_name,
            shapes(flat) | mask,
            shared=shared_names(flat),
            ignored=UNUSED_NORM,
        )

    def load(self, info: DraftInfo, target: TargetInfo | None) -> PEagleDraft:
        import torch

        from drafts.families.peagle.module import PEagleConfig, PEagleDraft

        plain = vars(config_of(info, target))
        draft = PEagleDraft(PEagleConfig(**plain, mask_token_id=mask_token(info.config)))
        shape = mask_shape(open_source(info.folder), draft.feature_size)
        draft.mask_hidden = torch.nn.Parameter(torch.zeros(shape))
        return fill(draft, info, self.module_name, target)

    def dump(self, draft: PEagleDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = super().dump(draft, dtype)
        config["pard_token"] = config.pop("mask_token_id")
        return config, tensors

    def init(self, target: TargetInfo, options: InitOptions) -> PEagleDraft:
        import torch

        from drafts.families.peagle.module import PEagleConfig, PEagleDraft
        from drafts.nn.layers import INIT_STD

        plain = super().init(
            target, replace(options, num_layers=options.num_layers or USUAL_LAYERS)
        )
        token = init_mask_token(target)
        draft = PEagleDraft(PEagleConfig(**vars(plain.config), mask_token_id=token))
        draft.load_state_dict(plain.state_dict(), strict=False)
        draft.set_vocabulary_map(plain.d2t)
        torch.nn.init.normal_(draft.mask_hidden, std=INIT_STD)
        return draft

    def to_layout(self, info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
        made = super().to_layout(info, raw, layout)
        token = mask_token(info.config)
        config = {key: value for key, value in made.config.items() if key not in MASK_TOKEN}
        if layout == "eagle":
            return Layout(config | {"pard_token": token}, made.rename)
        inner = {key: value for key, value in config[INNER].items() if key not in MASK_TOKEN}
        # vLLM reads these two from the decoder layer's fields, speculators from outside
        inner |= {key: True for key in ("fc_norm", "norm_output") if config[key]}
        config |= {
            "architectures": ["PEagleSpeculator"],
            "speculators_model_type": "peagle",
            "speculators_config": {**config["speculators_config"], "algorithm": "peagle"},
            "mask_token_id": token,
            INNER: inner,
        }
        stored = open_tensors(info.folder).headers.items()
        size = next(prod(h.shape) for name, h in stored if self.module_name(name) == MASK_HIDDEN)
        return replace(made, config=config, shapes={MASK_HIDDEN: (1, 1, size)})


def mask_shape(source: Source, size: int) -> tuple[int, ...]:
    """The shape of `mask_hidden`, which may have dimensions of size 1 in front.

    Raises `UserError` unless it is there and as long as the fused features.
    """
    if MASK_HIDDEN not in source.headers:
        raise UserError(
            f"names a mask token but lacks the tensor {MASK_HIDDEN}",
            where=source.folder,
            hint=FETCH,
        )
    found = source.headers[MASK_HIDDEN].shape
    if prod(found) != size:
        raise UserError(
            f"{MASK_HIDDEN} is {list(found)}, but fc.weight takes {size} inputs",
            where=source.folder,
            hint=FETCH,
        )
    return found
