"""P-EAGLE checkpoints: an EAGLE-3 layout with a `mask_hidden` tensor and a mask token.

The layout of EAGLE keeps EAGLE-3's architecture name and names the token `pard_token` (or
`mask_token_id`, `ptd_token_id`); speculators' is of type `peagle` and says `mask_token_id`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions, Layout
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.load import fill
from drafts.checkpoint.mask_token import check_mask_token, fresh_mask_token
from drafts.checkpoint.source import FETCH, Source, is_speculators
from drafts.checkpoint.speculators import INNER
from drafts.errors import UserError
from drafts.families.eagle3 import layouts as eagle3
from drafts.nn.layers import INIT_STD
from drafts.target import read_target
from drafts.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.peagle.module import PEagleDraft


ARCHITECTURES = {"PEagleDraftModel", "PeagleLlamaForCausalLM", "PeagleQwen3ForCausalLM"}
MASK_TOKEN = ("mask_token_id", "pard_token", "ptd_token_id")  # in vLLM's order
MASK_HIDDEN = "mask_hidden"
USUAL_LAYERS = 2  # of a fresh draft: one layer alone gives the masked slots little to go on


def matches(source: Source) -> bool:
    if is_speculators(source):
        return bool(source.raw["speculators_model_type"] == "peagle")
    named = set(source.raw.get("architectures") or [])
    masked = mask_token(source.raw) is not None or MASK_HIDDEN in map(module_name, source.headers)
    return bool(ARCHITECTURES & named) or (bool(eagle3.ARCHITECTURES & named) and masked)


def describe(source: Source) -> DraftInfo:
    info = eagle3.describe(source)
    flat = dict(info.config)
    if is_speculators(source):  # vLLM's default is not that of EAGLE-3
        flat["norm_before_residual"] = source.raw.get("norm_before_residual", False)
    field = "mask_token_id" if is_speculators(source) else "pard_token"
    check_mask_token(mask_token(flat), info.vocab_size, source.config_path, field)
    check_mask_hidden(source)
    return replace(info, family="peagle", config=flat, speculation={"parallel_drafting": True})


def check_mask_hidden(source: Source) -> None:
    """Raise `UserError` unless `mask_hidden` is there and as long as the fused features.

    It may have dimensions of size 1 in front, which differ between the layouts.
    """
    headers = {module_name(name): header for name, header in source.headers.items()}
    if MASK_HIDDEN not in headers:
        raise UserError(
            f"names a mask token but lacks the tensor {MASK_HIDDEN}",
            where=source.folder,
            hint=FETCH,
        )
    found, size = headers[MASK_HIDDEN].shape, headers["fc.weight"].shape[1]
    if prod(found) != size:
        raise UserError(
            f"{MASK_HIDDEN} is {list(found)}, but fc.weight takes {size} inputs",
            where=source.folder,
            hint=FETCH,
        )


def mask_token(flat: dict[str, Any]) -> Any:
    return next((flat[key] for key in MASK_TOKEN if flat.get(key) is not None), None)


def module_name(stored: str) -> str:
    return eagle3.module_name(stored)


def load(info: DraftInfo, target: Path | None) -> PEagleDraft:
    import torch

    from drafts.families.peagle.module import PEagleConfig, PEagleDraft

    plain = vars(eagle3.config_of(info, target))
    draft = PEagleDraft(PEagleConfig(**plain, mask_token_id=mask_token(info.config)))
    headers = open_tensors(info.folder).headers
    shape = next(h.shape for name, h in headers.items() if module_name(name) == MASK_HIDDEN)
    draft.mask_hidden = torch.nn.Parameter(torch.zeros(shape))
    fill(draft, info, module_name, target)
    return draft


def dump(draft: PEagleDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config, tensors = eagle3.dump(draft, dtype)
    config["pard_token"] = config.pop("mask_token_id")
    return config, tensors


def fresh(target: Path, options: InitOptions) -> PEagleDraft:
    import torch

    from drafts.families.peagle.module import PEagleConfig, PEagleDraft

    plain = eagle3.fresh(target, replace(options, num_layers=options.num_layers or USUAL_LAYERS))
    token = fresh_mask_token(read_target(target))
    draft = PEagleDraft(PEagleConfig(**vars(plain.config), mask_token_id=token))
    draft.load_state_dict(plain.state_dict(), strict=False)
    draft.set_vocabulary_map(plain.d2t)
    torch.nn.init.normal_(draft.mask_hidden, std=INIT_STD)
    return draft


def to_layout(info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
    made = eagle3.to_layout(info, raw, layout)
    token = mask_token(info.config)
    config = {key: value for key, value in made.config.items() if key not in MASK_TOKEN}
    if layout == "eagle":
        return Layout(config | {"pard_token": token}, made.rename)
    inner = {key: value for key, value in config[INNER].items() if key not in MASK_TOKEN}
    # vLLM reads these two from the decoder layer's fields
    inner |= {key: True for key in ("fc_norm", "norm_output") if config.pop(key)}
    config |= {
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "speculators_config": {**config["speculators_config"], "algorithm": "peagle"},
        "mask_token_id": token,
        INNER: inner,
    }
    return Layout(config, made.rename)


FAMILY = Family(
    name="peagle",
    title="P-EAGLE",
    formats=("eagle", "speculators"),
    matches=matches,
    describe=describe,
    module_name=module_name,
    load=load,
    dump=dump,
    fresh=fresh,
    to_layout=to_layout,
)
