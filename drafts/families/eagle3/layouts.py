"""EAGLE-3 checkpoints: the layout of EAGLE and SpecForge, and that of speculators.

They differ in where the config keeps its fields and in the name of the first decoder layer
(`midlayer.` or `layers.0.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from drafts.checkpoint.family import Family, InitOptions, Layout
from drafts.checkpoint.fields import refuse_bidirectional
from drafts.checkpoint.info import DraftInfo, make_info
from drafts.checkpoint.layer_config import (
    Layers,
    layer_config,
    layer_fields,
    layer_sizes,
    target_window,
    unstated_fields,
)
from drafts.checkpoint.layer_ids import check_layer_ids, default_layer_ids, spread_layer_ids
from drafts.checkpoint.load import fill
from drafts.checkpoint.shapes import Shapes, check_whole, layer_shapes, prefixed
from drafts.checkpoint.shared import stored_state, take_from_target
from drafts.checkpoint.source import Source, flatten, is_speculators
from drafts.checkpoint.speculators import (
    SPECULATORS,
    from_speculators,
    hindrances,
    to_speculators,
)
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from drafts.tensors import Header

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.eagle3.module import Eagle3Config, Eagle3Draft


# Those for which vLLM takes the module that is here, and the names of speculators.
ARCHITECTURES = {
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "Eagle3MiniMaxM2ForCausalLM",
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3ForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
    "Eagle3Speculator",
    "Eagle3DraftModel",
}
PLAIN = {"LlamaForCausalLM", "Qwen3ForCausalLM"}  # vLLM writes Eagle3 before them
FIRST_NORM = "layers.0.hidden_norm.weight"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
AUX, COUNT = "use_aux_hidden_state", "num_aux_hidden_states"
# Names of other programs for the same: feature_layers, target_layer_ids, aux_layers ...
OTHER_IDS = re.compile("(feature|target|aux|hidden|capture|eagle|fus).*layer|layer.*(feature|aux)")
NESTED_IDS = (
    f"{LAYER_IDS} stands only in eagle_config, where vLLM's V2 runner does not look: it would take "
    "its default. Write it at the top of config.json; `afaspec merge` does"
)
UNUSED_NORM = re.compile(r"layers\.[1-9]\d*\.hidden_norm\.weight").fullmatch  # vLLM's later layers
USUAL_K = 3  # what a speculators config names for servers that ask for no number
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


class Eagle3(Family):
    """The family of EAGLE-3 drafts."""

    name = "eagle3"
    title = "EAGLE-3"
    formats = ("eagle", "speculators")
    starts_from_target = True
    outside: ClassVar[dict[str, bool]] = dict.fromkeys(SWITCHES, False) | {
        "norm_before_residual": True
    }  # what vLLM takes from outside in the speculators layout, and its defaults there

    def matches(self, source: Source) -> bool:
        if is_speculators(source):
            return bool(source.raw["speculators_model_type"] == "eagle3")
        named = set(source.raw.get("architectures") or [])
        fused = any(self.module_name(name) == FIRST_NORM for name in source.headers)
        return bool(ARCHITECTURES & named) or (bool(PLAIN & named) and fused)

    def describe(self, source: Source) -> DraftInfo:
        flat = flatten(source)
        if is_speculators(source):
            flat |= {key: source.raw.get(key, usual) for key, usual in self.outside.items()}
        nested = flat.get("eagle_config") or {}
        ids = check_layer_ids(
            flat.get(LAYER_IDS) or nested.get(LAYER_IDS), source.config_path, LAYER_IDS
        )
        check_named_layers(flat, ids, source.config_path)
        check_served(flat, ids, source.config_path)
        names = self.check_tensors(source, flat)
        return make_info(
            source,
            flat,
            names,
            family="eagle3",
            method="eagle3",
            format="speculators" if is_speculators(source) else "eagle",
            layer_ids=ids,
            dtype=names["fc.weight"].dtype,
            warnings=() if flat.get(LAYER_IDS) or ids is None else (NESTED_IDS,),
        )

    def check_tensors(self, source: Source, flat: dict[str, Any]) -> dict[str, Header]:
        """The headers by module name. Raises `UserError` unless all tensors fit this config."""
        return check_whole(
            source, self.module_name, shapes(flat), shared=shared_names(flat), ignored=UNUSED_NORM
        )

    def module_name(self, stored: str) -> str:
        return stored.replace("midlayer.", "layers.0.", 1)

    def load(self, info: DraftInfo, target: TargetInfo | None) -> Eagle3Draft:
        from drafts.families.eagle3.module import Eagle3Draft

        return fill(Eagle3Draft(config_of(info, target)), info, self.module_name, target)

    def dump(self, draft: Eagle3Draft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from drafts.nn.layers import LayerConfig

        c = draft.config
        own = {f.name for f in fields(c)} - {f.name for f in fields(LayerConfig)} - {"layer_ids"}
        config = {
            "architectures": ["Eagle3Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLMEagle3"],
            "model_type": "qwen3" if c.qk_norm else "llama",
            **layer_config(c, dtype),
            **{name: getattr(c, name) for name in sorted(own)},
            LAYER_IDS: list(c.layer_ids),
            "num_aux_hidden_states": len(c.layer_ids),
        }
        return config, stored_tensors(draft, dtype)

    def init(self, target: TargetInfo, options: InitOptions) -> Eagle3Draft:
        from drafts.families.eagle3.module import Eagle3Config, Eagle3Draft
        from drafts.nn.layers import init_linears
        from drafts.target.head import logit_scale
        from drafts.target.layers import load_last_layers

        draft = Eagle3Draft(
            Eagle3Config(
                **layer_sizes(target, options.num_layers or 1, options.intermediate_size),
                target_hidden_size=target.hidden_size,
                vocab_size=target.vocab_size,
                draft_vocab_size=options.draft_vocab_size(target),
                layer_ids=options.layer_ids or spread_layer_ids(target.num_layers),
                logit_scale=logit_scale(target),
            )
        )
        init_linears(draft)
        if options.from_target:
            draft.begin_as(load_last_layers(target, draft.config.num_layers))
        take_from_target(draft, target, options.kept)
        return draft

    def written_config(self, info: DraftInfo, raw: dict[str, Any]) -> dict[str, Any]:
        """As the base class's, the layer ids at the top, where both of vLLM's runners read them."""
        nested = info.layer_ids is not None and not info.config.get(LAYER_IDS)
        ids = {LAYER_IDS: list(info.layer_ids or ())} if nested else {}
        return super().written_config(info, raw) | ids

    def to_layout(self, info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
        flat = info.config
        own: dict[str, Any] = dict(switches(flat))
        own["draft_vocab_size"] = info.draft_vocab_size
        if info.target_hidden_size != info.hidden_size:
            own["target_hidden_size"] = info.target_hidden_size
        if info.layer_ids is not None:
            own[LAYER_IDS] = list(info.layer_ids)
        layers = unstated_fields(flat, layers_of(flat)) | {"model_type": layers_of(flat)}
        if layout == SPECULATORS:
            both = bool(own["norm_before_fc"] and own["fc_norm"])
            found = hindrances(info, {"norms what fc takes twice": both})
            config = to_speculators(raw, "eagle3", "Eagle3Speculator", own, USUAL_K, layers)
            return Layout(config, self.module_name, hindrances=found)
        architecture = "Eagle3Qwen3ForCausalLM" if is_qwen3(flat) else "LlamaForCausalLMEagle3"
        config = from_speculators(raw, architecture, own, layers)
        return Layout(config, first_layer_name if flat.get("num_hidden_layers", 1) == 1 else str)


def shapes(flat: dict[str, Any]) -> Shapes:
    """The tensors of the module that this config makes, but for d2t."""
    fields = layer_fields(flat, layers_of(flat)) | {"qk_norm": is_qwen3(flat)}
    size, width, count = flat["hidden_size"], flat["target_hidden_size"], num_hidden_states(flat)
    made: Shapes = {
        "fc.weight": (size, count * width),
        FIRST_NORM: (size,),
        "norm.weight": (size,),
        "embed_tokens.weight": (flat["vocab_size"], size),
        "lm_head.weight": (flat["draft_vocab_size"], size),
    }
    for i in range(fields["num_layers"]):
        layer = layer_shapes(fields, input_size=2 * size if i == 0 else size)
        made |= prefixed(f"layers.{i}", layer)
    if switches(flat)["norm_before_fc"]:
        made["input_norm.weight"] = (count * width,)
    if switches(flat)["fc_norm"]:
        made |= {f"fc_norm.{i}.weight": (width,) for i in range(count)}
    return made


def num_hidden_states(flat: dict[str, Any]) -> int:
    """How many of the target's hidden states vLLM fuses, which it does not count at the top."""
    nested = (flat.get("eagle_config") or {}).get(LAYER_IDS)
    return int(flat.get("num_aux_hidden_states") or len(nested or ()) or 3)


def shared_names(flat: dict[str, Any]) -> tuple[str, ...]:
    """What may be the target's: the embedding, and the output layer of a full vocabulary."""
    full = flat["draft_vocab_size"] == flat["vocab_size"]
    return ("embed_tokens.weight", "lm_head.weight") if full else ("embed_tokens.weight",)


def check_named_layers(flat: dict[str, Any], ids: tuple[int, ...] | None, path: Path) -> None:
    """Raise `UserError` where layers are named so that vLLM takes others, or another number."""
    hint = f'write "{LAYER_IDS}" into it: the hidden states that the draft was trained on, i after '
    for key, value in named_layers(flat):
        if tuple(value) != ids:
            raise UserError(
                f"names layers {value} in {key}, where vLLM does not look"
                + (f", and {list(ids)} in {LAYER_IDS}" if ids else ""),
                where=path,
                hint=f"{hint}i layers; and remove {key}",
            )
    if ids is not None and len(ids) != num_hidden_states(flat):
        raise UserError(
            f"names {len(ids)} layers {list(ids)}, but vLLM fuses {num_hidden_states(flat)}",
            where=path,
            hint=f'write "num_aux_hidden_states": {len(ids)} into it, if the draft was trained on '
            "these",
        )


def named_layers(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Lists of numbers in fields whose names speak of layers to read, but for vLLM's own field."""
    for key, value in config.items():
        if isinstance(value, dict) and key in ("eagle_config", "dflash_config"):
            yield from named_layers(value)
        numbers = isinstance(value, list) and value and all(type(i) is int for i in value)
        if numbers and key != LAYER_IDS and OTHER_IDS.search(key):
            yield key, value


def config_of(info: DraftInfo, target: TargetInfo | None) -> Eagle3Config:
    """The module's configuration, layer ids filled in from the target where the draft has none."""
    from drafts.families.eagle3.module import Eagle3Config

    layer_ids = info.layer_ids
    if layer_ids is None:
        if target is None:
            raise UserError(
                f"names no {LAYER_IDS}",
                where=info.folder / "config.json",
                hint="add them, or give the target's folder as well",
            )
        layer_ids = default_layer_ids(target.num_layers)
    flat = info.config
    own: dict[str, Any] = switches(flat)
    return Eagle3Config(
        **layer_fields(flat, layers_of(flat)),
        qk_norm=is_qwen3(flat),
        target_window=target_window(target),
        target_hidden_size=info.target_hidden_size,
        vocab_size=info.vocab_size,
        draft_vocab_size=info.draft_vocab_size,
        layer_ids=layer_ids,
        logit_scale=float(flat.get("logit_scale", 1.0)),
        **own,
    )


def check_served(flat: dict[str, Any], ids: tuple[int, ...] | None, path: Path) -> None:
    """Raise `UserError` for what vLLM computes otherwise than this family, or fails on."""
    refuse_bidirectional(flat, path)
    layer_fields(flat, layers_of(flat), path)
    nested = flat.get("eagle_config") or {}
    for field, config in (("eagle_config.use_aux_hidden_state", nested), (AUX, flat)):
        if config.get(AUX, True) is not True:
            raise UserError(
                f"{field} is {config[AUX]!r}: the draft reads the last hidden state alone, which "
                "afaspec does not know for EAGLE-3",
                where=path,
                hint="use a draft that reads several layers, or an EAGLE draft",
            )
    counts = ("num_aux_layers", "num_aux_hidden_states") if is_qwen3(flat) else (COUNT,)
    count = next((flat[key] for key in counts if flat.get(key) is not None), None)
    if count is None:  # Llama's module counts only nested ids
        named = nested.get(LAYER_IDS) or (flat.get(LAYER_IDS) if is_qwen3(flat) else None)
        count = len(named) if named else 3
    if ids is not None and count != len(ids):
        raise UserError(
            f"names {len(ids)} layers in {LAYER_IDS}, but to vLLM its {COUNT} is {count!r}",
            where=path,
            hint=f'write "{COUNT}": {len(ids)} into it',
        )


def layers_of(flat: dict[str, Any]) -> Layers:
    """The decoder layers that vLLM has for the draft."""
    return "qwen3" if is_qwen3(flat) else "llama"


def switches(flat: dict[str, Any]) -> dict[str, bool]:
    """The switches as vLLM reads them: in `eagle_config` it looks for `norm_before_fc` alone."""
    nested = flat.get("eagle_config") or {}
    found = {key: bool(flat.get(key, False)) for key in SWITCHES}
    return {**found, "norm_before_fc": bool(nested.get("norm_before_fc", found["norm_before_fc"]))}


def is_qwen3(flat: dict[str, Any]) -> bool:
    """Are the layers Qwen3's, which norm queries and keys? So vLLM decides: by architecture in
    EAGLE's layout, by model type in speculators'."""
    if "speculators_model_type" in flat:
        return bool(flat.get("model_type") == "qwen3")
    return any("Qwen3ForCausalLM" in name for name in flat.get("architectures") or [])


def stored_tensors(draft: Any, dtype: Any) -> dict[str, Tensor]:
    """All tensors by their names in EAGLE's layout, but the embedding where it is the target's.

    A draft of another width than the target's can only have one of its own.
    """
    state = stored_state(draft, dtype)
    if draft.config.hidden_size == draft.config.target_hidden_size:
        del state["embed_tokens.weight"]
    if draft.config.num_layers == 1:
        state = {first_layer_name(n): t for n, t in state.items()}
    return state


def first_layer_name(name: str) -> str:
    """EAGLE's name for a tensor of a draft with one decoder layer."""
    return name.replace("layers.0.", "midlayer.", 1)
