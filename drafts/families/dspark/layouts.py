"""DSpark checkpoints: DeepSeek's layout (`Qwen3DSparkModel`) and that of speculators.

Both are DFlash's with the Markov head's two matrices beside, and perhaps a confidence head.
DeepSeek's names the target's layers from 0 in `target_layer_ids`, and the fields of the block at
the top; a draft samples from the anchor there unless it says otherwise, in speculators' the
other way round, as vLLM reads the two.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import InitOptions, Layout
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.shapes import Shapes
from drafts.checkpoint.source import FETCH, Source, is_speculators, open_source
from drafts.errors import UserError
from drafts.families.dflash.layouts import DFlash, Settings, dflash_shapes, settings_of
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.dspark.module import DSparkDraft

ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel")
USUAL_RANK = 256
NOISE = ("mask_token_id", "dspark_noise_token_id")  # what names the mask token, in vLLM's order
CONFIDENCE = "confidence_head."
OWN_FIELDS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)


class DSpark(DFlash):
    """The family of DSpark drafts."""

    name = "dspark"
    title = "DSpark"
    formats = ("dspark", "speculators")
    kind = "dspark"
    speculator = "DSparkSpeculator"
    architecture = ARCHITECTURES[0]

    def matches(self, source: Source) -> bool:
        if is_speculators(source):
            return bool(source.raw["speculators_model_type"] == "dspark")
        named = set(source.raw.get("architectures") or [])
        return bool(named & set(ARCHITECTURES)) and source.raw.get("model_type") == "qwen3"

    def variants(self, flat: dict[str, Any]) -> dict[str, bool]:
        found = super().variants(flat)
        del found["drafting from the anchor"]
        kind = flat.get("markov_head_type") or "vanilla"
        return found | {
            f"a Markov head of the kind {kind} (vLLM computes `vanilla`)": kind != "vanilla",
            "a Markov head for the likeliest tokens alone (dspark_draft_topk)": bool(
                flat.get("dspark_draft_topk")
            ),
        }

    def max_k(self, settings: Settings, flat: dict[str, Any]) -> int | None:
        size = settings.block_size
        return size if size is None or from_anchor(flat) else size - 1

    def read_settings(self, flat: dict[str, Any], path: Path) -> Settings:
        if not isinstance(flat.get("markov_rank"), int) or flat["markov_rank"] < 1:
            raise UserError(
                f"markov_rank is {flat.get('markov_rank')!r}, expected the Markov head's rank",
                where=path,
                hint=FETCH,
            )
        nested = flat.get("dflash_config") or {}
        if "speculators_model_type" in flat:
            field, ids = "aux_hidden_state_layer_ids", flat.get("aux_hidden_state_layer_ids")
        else:
            field = "target_layer_ids"
            given = (flat.get(f) for f in (field, f"dspark_{field}"))
            numbers = next(filter(None, given), None) or nested.get(field) or []
            ids = flat.get("eagle_aux_hidden_state_layer_ids") or [i + 1 for i in numbers]
        tokens = [(f"dflash_config.{NOISE[0]}", nested.get(NOISE[0]))]
        tokens += [(name, flat.get(name)) for name in NOISE]
        named = [(name, token) for name, token in tokens if token is not None]
        token = (named or tokens[1:])[0]
        return settings_of(flat, path, (field, ids), token, nested.get("causal"))

    def shapes(self, source: Source, flat: dict[str, Any], count: int) -> Shapes:
        rank = flat["markov_rank"]
        made = dflash_shapes(flat, count) | {
            "markov_head.markov_w1.weight": (flat["vocab_size"], rank),
            "markov_head.markov_w2.weight": (flat["draft_vocab_size"], rank),
        }
        if width := confidence(source, flat):
            made |= {f"{CONFIDENCE}proj.weight": (1, width), f"{CONFIDENCE}proj.bias": (1,)}
        return made

    def build(self, info: DraftInfo, common: dict[str, Any]) -> DSparkDraft:
        from drafts.families.dspark.module import DSparkConfig, DSparkDraft

        flat = info.config
        return DSparkDraft(
            DSparkConfig(
                **common,
                markov_rank=flat["markov_rank"],
                from_anchor=from_anchor(flat),
                confidence=confidence(open_source(info.folder), flat),
            )
        )

    def dump(self, draft: DSparkDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = draft.config
        config, state = super().dump(draft, dtype)
        config |= at_the_top(config.pop("dflash_config"))
        config |= own_fields(c.markov_rank, c.confidence, c.hidden_size)
        return config | {"sample_from_anchor": c.from_anchor}, state

    def init(self, target: TargetInfo, options: InitOptions) -> DSparkDraft:
        import torch

        from drafts.families.dspark.module import DSparkConfig, DSparkDraft
        from drafts.nn.layers import INIT_STD

        plain = super().init(target, options)
        config = replace(plain.config, block_size=options.max_k)
        rank = min(USUAL_RANK, config.hidden_size)
        draft = DSparkDraft(DSparkConfig(**vars(config), markov_rank=rank))
        for weight in (draft.markov_head.markov_w1.weight, draft.markov_head.markov_w2.weight):
            torch.nn.init.normal_(weight, std=INIT_STD)
        draft.load_state_dict(plain.state_dict(), strict=False)
        draft.set_vocabulary_map(plain.d2t)
        return draft

    def to_layout(self, info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
        made = super().to_layout(info, raw, layout)
        flat, config = info.config, dict(made.config)
        own = {key: flat[key] for key in OWN_FIELDS if flat.get(key) is not None}
        if layout == "dspark":
            own |= at_the_top(config.pop("dflash_config"))
        config |= own | {"sample_from_anchor": from_anchor(flat)}
        if layout == "speculators":
            inner = config["transformer_layer_config"]
            for name in (*OWN_FIELDS, "sample_from_anchor", "target_layer_ids", *NOISE):
                inner.pop(name, None)
            config.setdefault("markov_head_type", "vanilla")
            config["enable_confidence_head"] = bool(confidence(open_source(info.folder), flat))
            config["confidence_head_with_markov"] = bool(flat.get("confidence_head_with_markov"))
        return replace(made, config=config)


def at_the_top(nested: dict[str, Any]) -> dict[str, Any]:
    """DFlash's settings where DeepSeek's layout has them; the others stay in `dflash_config`."""
    names = {"target_layer_ids": "target_layer_ids", "mask_token_id": "mask_token_id"}
    names |= {"causal": "is_causal"}
    left = {key: value for key, value in nested.items() if key not in names}
    top = {names[key]: value for key, value in nested.items() if key in names}
    return top | ({"dflash_config": left} if left else {})


def own_fields(rank: int, width: int | None, size: int) -> dict[str, Any]:
    """What a config says of the heads; `width` is the confidence head's, None for none."""
    return {
        "markov_rank": rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": width is not None,
        "confidence_head_with_markov": width is not None and width > size,
    }


def from_anchor(flat: dict[str, Any]) -> bool:
    """Is a token sampled from the anchor, as vLLM reads the two layouts?"""
    return bool(flat.get("sample_from_anchor", "speculators_model_type" not in flat))


def confidence(source: Source, flat: dict[str, Any]) -> int | None:
    """The width that the confidence head reads; None where none is stored."""
    if not any(name.startswith(CONFIDENCE) for name in source.headers):
        return None
    with_markov = bool(flat.get("confidence_head_with_markov"))
    width: int = flat["hidden_size"] + with_markov * flat["markov_rank"]
    return width
