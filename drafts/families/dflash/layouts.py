"""DFlash checkpoints: z-lab's layout and that of speculators.

z-lab's has Qwen3's config with a `dflash_config`, whose `target_layer_ids` count layers from 0, so
that id i is the hidden state after i + 1 layers. speculators' names the hidden states themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions, Layout
from drafts.checkpoint.info import DraftInfo, make_info
from drafts.checkpoint.layer_config import (
    FULL,
    SLIDING,
    layer_config,
    layer_fields,
    layer_sizes,
    layer_types,
    target_window,
    unstated_fields,
)
from drafts.checkpoint.layer_ids import check_layer_ids, spread_layer_ids
from drafts.checkpoint.load import fill
from drafts.checkpoint.mask_token import check_mask_token, init_mask_token
from drafts.checkpoint.shapes import Shapes, check_whole, layer_shapes, prefixed
from drafts.checkpoint.shared import stored_state, take_from_target
from drafts.checkpoint.source import Source, flatten, is_speculators
from drafts.checkpoint.speculators import (
    from_speculators,
    hindrances,
    to_speculators,
)
from drafts.errors import UserError
from drafts.pickles import MASK_EMBEDDING
from drafts.target.info import SHARED, TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.dflash.module import DFlashConfig, DFlashDraft


ARCHITECTURE = "DFlashDraftModel"
# Of a fresh draft. With more, vLLM's CPU build computes something else: it norms the context keys
# of all layers with the first one's k_norm (as its XPU build did: vllm-project/vllm pull 56431).
USUAL_LAYERS = 1
USUAL_K = 3  # what a speculators config names where the draft has no block size


class DFlash(Family):
    """The family of DFlash drafts."""

    name = "dflash"
    title = "DFlash"
    formats = ("dflash", "speculators")
    kind = "dflash"  # its method in vLLM, and its type in speculators
    speculator = "DFlashSpeculator"
    architecture = ARCHITECTURE

    def matches(self, source: Source) -> bool:
        if is_speculators(source):
            return bool(source.raw["speculators_model_type"] == "dflash")
        return ARCHITECTURE in (source.raw.get("architectures") or [])

    def describe(self, source: Source) -> DraftInfo:
        """`max_k` is one less than the block that the draft was trained with, whose first slot is
        the token already known: masks beyond it would stand at distances that it never saw."""
        flat = flatten(source)
        if is_speculators(source):
            flat.pop("dflash_config", None)  # vLLM writes its own
        refuse_unsupported(self.variants(flat), source)
        layer_fields(flat, "dflash", source.config_path)
        settings = self.read_settings(flat, source.config_path)
        made = self.shapes(source, flat, len(settings.layer_ids))
        names = check_whole(source, self.module_name, made, shared=shared_names(flat))
        return make_info(
            source,
            flat,
            names,
            family=self.name,
            method=self.kind,
            format="speculators" if is_speculators(source) else self.formats[0],
            layer_ids=settings.layer_ids,
            dtype=names["fc.weight"].dtype,
            max_k=self.max_k(settings, flat),
        )

    def variants(self, flat: dict[str, Any]) -> dict[str, bool]:
        """What a config may ask for whose forward is not the one computed here, and does it?"""
        nested = flat.get("dflash_config") or {}
        drafter = {**(flat.get("eagle_config") or {}), **nested}
        return {
            "drafting from the anchor": bool(
                flat.get("sample_from_anchor") or nested.get("sample_from_anchor")
            ),
            "a draft of the last hidden state alone (use_aux_hidden_state)": not drafter.get(
                "use_aux_hidden_state", flat.get("use_aux_hidden_state", True)
            ),
        }

    def max_k(self, settings: Settings, flat: dict[str, Any]) -> int | None:
        """The most tokens that it drafts, None for any number."""
        return settings.block_size - 1 if settings.block_size else None

    def read_settings(self, flat: dict[str, Any], path: Path) -> Settings:
        """The draft's own settings, as vLLM reads them. `UserError` for missing or odd ones."""
        return read_settings(flat, path)

    def shapes(self, source: Source, flat: dict[str, Any], count: int) -> Shapes:
        """The tensors of the module of `count` hidden states that this config makes."""
        return dflash_shapes(flat, count)

    def module_name(self, stored: str) -> str:
        name = stored.replace("midlayer.", "layers.0.", 1)
        return name.replace("encoder.output_norm_enc.", "hidden_norm.").replace(
            "encoder.fc.", "fc."
        )

    def load(self, info: DraftInfo, target: TargetInfo | None) -> DFlashDraft:
        settings = self.read_settings(info.config, info.folder / "config.json")
        common = {
            **layer_fields(info.config, "dflash"),
            "target_window": target_window(target),
            **vars(settings),
            "target_hidden_size": info.target_hidden_size,
            "vocab_size": info.vocab_size,
            "draft_vocab_size": info.draft_vocab_size,
            "logit_scale": float(info.config.get("logit_scale", 1.0)),
        }
        return fill(self.build(info, common), info, self.module_name, target)

    def build(self, info: DraftInfo, common: dict[str, Any]) -> DFlashDraft:
        """The module without its values; `common` are fields of its config."""
        from drafts.families.dflash.module import DFlashConfig, DFlashDraft

        return DFlashDraft(DFlashConfig(**common))

    def dump(self, draft: DFlashDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = draft.config
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            **layer_config(c, dtype),
            "vocab_size": c.vocab_size,
            "draft_vocab_size": c.draft_vocab_size,
            "target_hidden_size": c.target_hidden_size,
            "logit_scale": c.logit_scale,
            "dflash_config": dflash_config(c),
        }
        if c.block_size is not None:
            config["block_size"] = c.block_size
        state = stored_state(draft, dtype)
        del state["embed_tokens.weight"]
        return config, state

    def init(self, target: TargetInfo, options: InitOptions) -> DFlashDraft:
        from drafts.families.dflash.module import DFlashConfig, DFlashDraft
        from drafts.nn.layers import init_linears
        from drafts.target.head import logit_scale

        draft = DFlashDraft(
            DFlashConfig(
                **layer_sizes(
                    target, options.num_layers or USUAL_LAYERS, options.intermediate_size
                ),
                target_hidden_size=target.hidden_size,
                vocab_size=target.vocab_size,
                draft_vocab_size=options.draft_vocab_size(target),
                layer_ids=options.layer_ids or spread_layer_ids(target.num_layers),
                mask_token_id=init_mask_token(target),
                block_size=options.max_k + 1,
                logit_scale=logit_scale(target),
            )
        )
        init_linears(draft)
        take_from_target(draft, target, options.kept)
        return draft

    def to_layout(self, info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
        settings = self.read_settings(info.config, info.folder / "config.json")
        own: dict[str, Any] = {"draft_vocab_size": info.draft_vocab_size}
        if info.target_hidden_size != info.hidden_size:
            own["target_hidden_size"] = info.target_hidden_size
        if settings.block_size is not None:
            own["block_size"] = settings.block_size
        layers = unstated_fields(info.config, "dflash")
        layers["model_type"] = "qwen3"
        if layout == self.formats[0]:
            own["dflash_config"] = dflash_config(settings)
            return Layout(from_speculators(raw, self.architecture, own, layers), str)
        if len(set(settings.causal)) > 1:
            raise UserError(
                "is causal in some of its layers only, which the speculators layout cannot say",
                where=info.folder,
                hint="serve it in the layout that it has",
            )
        own |= {
            "aux_hidden_state_layer_ids": list(settings.layer_ids),
            "mask_token_id": settings.mask_token_id,
            "sliding_window_non_causal": not any(settings.causal),
        }
        flat = {key: value for key, value in raw.items() if key != "dflash_config"}
        k = self.max_k(settings, info.config) or USUAL_K
        config = to_speculators(flat, self.kind, self.speculator, own, k, layers)
        full = info.draft_vocab_size == info.vocab_size
        return Layout(
            config,
            self.module_name,
            replaced=tuple(SHARED)[: 2 if full else 1],
            hindrances=hindrances(
                info,
                {
                    "is causal": any(settings.causal),
                    "has attention sinks": settings.sinks,
                    "scales its attention's values": settings.value_scale != 1.0,
                },
            ),
        )


def dflash_shapes(flat: dict[str, Any], count: int) -> Shapes:
    """Of DFlash's own tensors, but for d2t."""
    fields = layer_fields(flat, "dflash") | {"qk_norm": True}
    size = flat["hidden_size"]
    made: Shapes = {
        "fc.weight": (size, count * flat["target_hidden_size"]),
        "hidden_norm.weight": (size,),
        "norm.weight": (size,),
        "embed_tokens.weight": (flat["vocab_size"], size),
        "lm_head.weight": (flat["draft_vocab_size"], size),
    }
    for i in range(fields["num_layers"]):
        made |= prefixed(f"layers.{i}", layer_shapes(fields))
        if (flat.get("dflash_config") or {}).get("attention_sink_bias"):
            made[f"layers.{i}.self_attn.attention_sink_bias"] = (fields["num_attention_heads"],)
    return made


def shared_names(flat: dict[str, Any]) -> tuple[str, ...]:
    """What may be the target's: the embedding, and the output layer of a full vocabulary."""
    full = flat["draft_vocab_size"] == flat["vocab_size"]
    return ("embed_tokens.weight", "lm_head.weight") if full else ("embed_tokens.weight",)


@dataclass(frozen=True)
class Settings:
    """What the two layouts say in different places."""

    layer_ids: tuple[int, ...]
    mask_token_id: int
    block_size: int | None
    causal: tuple[bool, ...]
    sinks: bool = False
    value_scale: float = 1.0


def read_settings(flat: dict[str, Any], path: Path) -> Settings:
    """The draft's own settings, as vLLM reads them. Raises `UserError` for missing or odd ones."""
    nested = flat.get("dflash_config") or {}
    if "speculators_model_type" in flat:
        field, token_field = "aux_hidden_state_layer_ids", "mask_token_id"
        ids, token = flat.get(field), flat.get(token_field)
        causal: bool | None = not flat.get("sliding_window_non_causal", True)
    else:
        field, token_field = "dflash_config.target_layer_ids", "dflash_config.mask_token_id"
        numbers = nested.get("target_layer_ids") or []
        ids = flat.get("eagle_aux_hidden_state_layer_ids") or [i + 1 for i in numbers]
        token = nested.get("mask_token_id", flat.get("mask_token_id"))
        causal = nested.get("causal")
    return settings_of(flat, path, (field, ids), (token_field, token), causal)


def settings_of(
    flat: dict[str, Any],
    path: Path,
    ids: tuple[str, Any],
    token: tuple[str, Any],
    causal: bool | None,
) -> Settings:
    """Settings of the layers' `ids` and the mask `token`, each with the field that names it, and of
    what the layout says of all layers: are they `causal`? Else those are that slide."""
    if flat.get("is_causal") is not None:
        causal = flat["is_causal"]
    kinds = layer_types(flat, path) or [FULL] * flat["num_hidden_layers"]
    causals = tuple(kind == SLIDING if causal is None else bool(causal) for kind in kinds)
    layer_ids = check_layer_ids(ids[1], path, ids[0])
    if layer_ids is None:
        raise UserError(
            f"names no {ids[0]}",
            where=path,
            hint="write the layers of the target that the draft was trained on",
        )
    mask = check_mask_token(token[1], flat["vocab_size"], path, token[0])
    nested = flat.get("dflash_config") or {}
    scale = nested.get("attention_value_scale")
    return Settings(
        layer_ids,
        mask,
        flat.get("block_size"),
        causals if any(causals) else (),
        sinks=bool(nested.get("attention_sink_bias")),
        value_scale=1.0 if scale is None else float(scale),
    )


def dflash_config(of: Settings | DFlashConfig) -> dict[str, Any]:
    """What z-lab's layout says of a draft's own settings: layers that differ go by their kind."""
    ids = [i - 1 for i in of.layer_ids]
    nested: dict[str, Any] = {"mask_token_id": of.mask_token_id, "target_layer_ids": ids}
    nested |= {"attention_sink_bias": True} if of.sinks else {}
    nested |= {"attention_value_scale": of.value_scale} if of.value_scale != 1.0 else {}
    return nested if len(set(of.causal)) > 1 else nested | {"causal": any(of.causal)}


def refuse_unsupported(variants: dict[str, bool], source: Source) -> None:
    """Raise `UserError` for variants whose forward is not the one computed here."""
    if found := [name for name, present in variants.items() if present]:
        raise UserError(
            f"uses {', '.join(found)}, which afaspec does not know for such a draft",
            where=source.config_path,
            hint="serve it with vLLM as it is, or adapt one without",
        )
    if (source.folder / MASK_EMBEDDING).exists():
        raise UserError(
            f"keeps the mask token's embedding in {MASK_EMBEDDING}; afaspec does not load pickles",
            where=source.folder,
            hint="make it a row of the draft's embedding: "
            "afaspec convert DRAFT --target TARGET --out NEW",
        )
