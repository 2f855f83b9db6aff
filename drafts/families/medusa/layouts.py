"""Medusa checkpoints: vLLM's layout, and FasterDecoding's of bare head and layer numbers.

Which tensors count, and which sizes a config that leaves them out means, is what vLLM makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions, Layout
from drafts.checkpoint.fields import refuse_fields
from drafts.checkpoint.info import DraftInfo, make_info
from drafts.checkpoint.load import fill
from drafts.checkpoint.shapes import Shapes, check_whole, linear_shapes
from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from drafts.tensors import dtype_name

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.medusa.module import MedusaConfig, MedusaDraft


ARCHITECTURE = "MedusaModel"
DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 1}
SHARED_HEAD = "lm_head.weight"
FIRST_HEAD = "lm_heads.0.head.weight"
ALONE = (
    "its heads share the target's output layer, which vLLM wants in the checkpoint: train it and "
    "serve what `afaspec merge` writes"
)


class Medusa(Family):
    """The family of Medusa drafts."""

    name = "medusa"
    title = "Medusa"
    formats = ("medusa", "medusa-heads")

    def matches(self, source: Source) -> bool:
        raw = source.raw
        named = raw.get("model_type") == "medusa" or ARCHITECTURE in (
            raw.get("architectures") or []
        )
        return named or "medusa_num_heads" in raw

    def describe(self, source: Source) -> DraftInfo:
        names = {self.module_name(stored): header for stored, header in source.headers.items()}
        flat = flatten(source, names)
        check_tensors(source, self.module_name, flat)
        alone = heads_alone(names)
        return make_info(
            source,
            flat,
            names,
            family="medusa",
            format="medusa-heads" if any(map(is_numbered, source.headers)) else "medusa",
            method="medusa",
            target_hidden_size=flat["hidden_size"],
            draft_vocab_size=flat["vocab_size"],
            layer_ids=(),
            max_positions=None,
            rope=None,
            dtype=names["blocks.0.0.linear.weight"].dtype,
            shared=(SHARED_HEAD,) if flat["original_lm_head"] else (),
            reads="final",
            max_k=flat["num_heads"],
            to_store=(SHARED_HEAD,) if alone else (),
            warnings=(ALONE,) if alone else (),
        )

    def module_name(self, stored: str) -> str:
        parts = stored.replace("medusa_heads.", "").split(".")
        if is_numbered(stored) and "linear" in parts:
            return ".".join(["blocks", *parts])
        if is_numbered(stored):
            return f"lm_heads.{parts[0]}.head.{parts[-1]}"
        if parts[0] == "blocks" and len(parts) == 5:
            return f"blocks.{parts[1]}.{parts[3]}.linear.{parts[4]}"
        if parts[0] == "lm_heads" and len(parts) == 3:
            return f"lm_heads.{parts[1]}.head.{parts[2]}"
        return ".".join(parts)

    def load(self, info: DraftInfo, target: TargetInfo | None) -> MedusaDraft:
        from drafts.families.medusa.module import MedusaDraft

        rename = shared_name if info.config["original_lm_head"] else str
        draft = MedusaDraft(config_of(info.config))
        return fill(draft, info, lambda stored: rename(self.module_name(stored)), target)

    def dump(self, draft: MedusaDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c = draft.config
        config = {
            "architectures": [ARCHITECTURE],
            "model_type": "medusa",
            "hidden_size": c.hidden_size,
            "vocab_size": c.vocab_size,
            "num_heads": c.num_heads,
            "num_hidden_layers": c.num_layers,
            "medusa_fc_bias": c.bias,
            "original_lm_head": c.shared_head,
            "logit_scale": c.logit_scale,
            "dtype": dtype_name(dtype),
        }
        tensors = {
            stored_name(own): p.detach().to(dtype).contiguous()
            for own, p in draft.named_parameters()
        }
        return config, tensors

    def init(self, target: TargetInfo, options: InitOptions) -> MedusaDraft:
        """Heads that each start as the target's own output layer, as in the paper; blocks add 0."""
        import torch

        from drafts.families.medusa.module import MedusaConfig, MedusaDraft
        from drafts.target.head import load_lm_head, logit_scale

        if options.kept is not None:
            raise UserError(
                "vLLM loads no Medusa draft of a reduced vocabulary",
                hint="leave the vocabulary full, or choose the family eagle3",
            )
        head = load_lm_head(target)
        draft = MedusaDraft(
            MedusaConfig(
                hidden_size=target.hidden_size,
                vocab_size=target.vocab_size,
                num_heads=options.max_k,
                num_layers=options.num_layers or 1,
                logit_scale=logit_scale(target),
            )
        )
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                parameter.copy_(head) if name.startswith("lm_heads") else parameter.zero_()
        return draft

    def written_config(self, info: DraftInfo, raw: dict[str, Any]) -> dict[str, Any]:
        """As the base class's; of heads alone, what vLLM needs to read them as they are."""
        plain = super().written_config(info, raw)
        if not info.to_store:
            return plain
        return plain | {k: info.config[k] for k in ("original_lm_head", "medusa_fc_bias")}

    def to_layout(self, info: DraftInfo, raw: dict[str, Any], layout: str) -> Layout:
        counts = {key for key in raw if "num" in key and ("heads" in key or "layers" in key)}
        own = {k: v for k, v in raw.items() if k not in counts | {"architectures", "model_type"}}
        own |= {"hidden_size": info.hidden_size, "vocab_size": info.vocab_size}
        heads, layers = info.config["num_heads"], info.config["num_hidden_layers"]
        if layout == "medusa":
            named = {"architectures": [ARCHITECTURE], "model_type": "medusa"}
            config = {**named, "num_heads": heads, "num_hidden_layers": layers, **own}
            return Layout(config, lambda name: stored_name(self.module_name(name)))
        config = {"medusa_num_heads": heads, "medusa_num_layers": layers, **own}
        return Layout(config, lambda name: numbered_name(self.module_name(name), layers))


def flatten(source: Source, names: dict[str, Any]) -> dict[str, Any]:
    """The config under the names that vLLM gives its fields, whatever they are called in it.

    A config without `vocab_size` has that of its first head (vLLM takes the target's), one without
    a number of heads has those that are stored (vLLM takes as many as it is to draft tokens).
    """
    flat: dict[str, Any] = dict(DEFAULTS)
    counts: dict[str, str] = {}
    for key, value in source.raw.items():
        kinds = {"heads": "num_heads", "layers": "num_hidden_layers"} if "num" in key else {}
        field = next((field for part, field in kinds.items() if part in key), key)
        if field in counts and flat[field] != value:
            raise UserError(
                f"names {flat[field]} in {counts[field]} and {value} in {key}, of which vLLM takes "
                f"the last as {field}",
                where=source.config_path,
                hint=f"leave one of them, with the number of the draft's {field[4:]}",
            )
        counts[field], flat[field] = key, value
    refuse_fields(flat | {"rms_norm_eps": 0}, source.config_path)  # there is no norm
    if flat.get("hidden_act") not in (None, "silu"):
        raise UserError(
            f"hidden_act is {flat['hidden_act']}, but vLLM has only silu in Medusa's heads",
            where=source.config_path,
            hint="use heads that were trained with silu",
        )
    named = flat.setdefault("architectures", [ARCHITECTURE])
    if ARCHITECTURE not in named:
        raise UserError(
            f"names the architecture {named}, which vLLM does not load as Medusa heads",
            where=source.config_path,
            hint=f'write "architectures": ["{ARCHITECTURE}"]',
        )
    head, alone = names.get(FIRST_HEAD) or names.get(SHARED_HEAD), heads_alone(names)
    if head is None and not (alone and flat.get("vocab_size")):
        raise UserError(
            f"lacks the tensor {FIRST_HEAD}"
            + (" and the config vocab_size, the rows of the target's output layer" * alone),
            where=source.folder,
            hint='write "vocab_size" into config.json: these are heads that share the target\'s '
            "output layer"
            if alone
            else FETCH,
        )
    flat.setdefault("num_heads", len({n.split(".")[1] for n in names if n.startswith("blocks.")}))
    flat["vocab_size"] = flat.get("vocab_size") or (head and head.shape[0])
    if flat.get("truncated_vocab_size", flat["vocab_size"]) not in (None, flat["vocab_size"]):
        raise UserError(
            "has a reduced vocabulary (truncated_vocab_size), which vLLM fails to load: it reads "
            "token_map and then misses it",
            where=source.config_path,
            hint="use a draft of the full vocabulary",
        )
    flat["original_lm_head"] = alone or bool(flat.get("original_lm_head", False))
    biased = alone and "blocks.0.0.linear.bias" in names
    flat["medusa_fc_bias"] = biased or bool(flat.get("medusa_fc_bias", False))
    return flat


def heads_alone(names: dict[str, Any]) -> bool:
    """Are these heads without any output layer, which they share with the target?

    vLLM does not read them so: a merge writes the output layer beside them.
    """
    return not any("lm_head" in name for name in names)


def shared_name(own: str) -> str:
    """The module's name of a tensor where all heads end in one output layer."""
    return SHARED_HEAD if own == FIRST_HEAD else own


def check_tensors(source: Source, rename: Callable[[str], str], flat: dict[str, Any]) -> None:
    """Raise `UserError` unless vLLM computes with all stored tensors, of the config's sizes."""
    size, count = flat["hidden_size"], flat["num_heads"]
    names = {rename(stored): header for stored, header in source.headers.items()}
    block = names.get("blocks.0.0.linear.weight")
    if "hidden_size" not in source.raw and block is not None and block.shape != (size, size):
        raise UserError(
            f"names no hidden_size; vLLM takes {size}, but the heads have {block.shape[0]}",
            where=source.config_path,
            hint=f'write "hidden_size": {block.shape[0]} into it',
        )
    made = shapes(flat)
    if flat["original_lm_head"] and SHARED_HEAD not in names and FIRST_HEAD in names:
        made[FIRST_HEAD] = made.pop(SHARED_HEAD)

    def further(name: str) -> bool:
        """Of a head that the config does not count, which is no part of the draft."""
        group, number, *_ = [*name.split("."), ""]
        return group in ("blocks", "lm_heads") and number.isdigit() and int(number) >= count

    shared = [SHARED_HEAD] if heads_alone(names) else []
    check_whole(source, rename, made, shared=shared, ignored=further, leaves_out=True)


def shapes(flat: dict[str, Any]) -> Shapes:
    """The tensors of the module that this config makes."""
    size, vocabulary = flat["hidden_size"], flat["vocab_size"]
    made: Shapes = {}
    for i in range(flat["num_heads"]):
        for j in range(flat["num_hidden_layers"]):
            made |= linear_shapes(f"blocks.{i}.{j}.linear", size, size, flat["medusa_fc_bias"])
        if not flat["original_lm_head"]:
            made[f"lm_heads.{i}.head.weight"] = (vocabulary, size)
    return made | {SHARED_HEAD: (vocabulary, size)} if flat["original_lm_head"] else made


def is_numbered(stored: str) -> bool:
    """Is this a tensor name of FasterDecoding's layout: head number, layer number, the rest?"""
    parts = stored.replace("medusa_heads.", "").split(".")
    return len(parts) > 2 and parts[0].isdigit() and parts[1].isdigit()


def stored_name(own: str) -> str:
    """The name in vLLM's layout of a module's parameter."""
    parts = own.split(".")
    if parts[0] == "blocks":
        return f"blocks.{parts[1]}.layers.{parts[2]}.{parts[4]}"
    return own.replace(".head.", ".", 1)


def numbered_name(own: str, num_layers: int) -> str:
    """The name in FasterDecoding's layout of a module's parameter."""
    parts = own.split(".")
    if parts[0] == "blocks":
        return ".".join(parts[1:])
    return f"{parts[1]}.{num_layers}.{parts[3]}" if parts[0] == "lm_heads" else own


def config_of(flat: dict[str, Any]) -> MedusaConfig:
    from drafts.families.medusa.module import MedusaConfig

    return MedusaConfig(
        hidden_size=flat["hidden_size"],
        vocab_size=flat["vocab_size"],
        num_heads=flat["num_heads"],
        num_layers=flat["num_hidden_layers"],
        bias=flat["medusa_fc_bias"],
        shared_head=flat["original_lm_head"],
        logit_scale=float(flat.get("logit_scale", 1.0)),
    )
