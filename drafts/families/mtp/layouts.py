"""MTP checkpoints: the tensors of the layer as the target stores them, and the target's config.

A folder of them alone is what vLLM's method `mtp` takes as `model`; `afaspec init mtp` reads one
out of a target. Names are DeepSeek-V3's (a layer behind the last, `model.layers.61.eh_proj`), as in
GLM-4.5 too, or Qwen's (`mtp.fc`).
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions
from drafts.checkpoint.info import DraftInfo, make_info
from drafts.checkpoint.load import fill
from drafts.checkpoint.shapes import check_whole
from drafts.checkpoint.shared import take_from_target
from drafts.checkpoint.source import FETCH, Source, load_tensor, open_source
from drafts.errors import UserError, first_line
from drafts.quantization import without_quantization
from drafts.target.info import SHARED, TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.mtp.module import MtpDraft, MtpParts

COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
BEHIND = re.compile(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)")
BEHIND_NAMES = {
    "shared_head.norm.weight": "norm.weight",
    "shared_head.head.weight": "lm_head.weight",
}
OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight")
QWEN_NAMES = {
    "pre_fc_norm_embedding.weight": "enorm.weight",
    "pre_fc_norm_hidden.weight": "hnorm.weight",
    "fc.weight": "eh_proj.weight",
}
IN_FLOAT32 = "e_score_correction_bias"  # what decides between experts keeps its precision


@dataclass(frozen=True)
class Style:
    """How an architecture's layer is named and served. `behind`: as a layer behind the last."""

    behind: bool
    keeps_first: bool
    feeds_normed: bool


STYLES = {  # by the language model's model_type
    "deepseek_v3": Style(behind=True, keeps_first=False, feeds_normed=True),
    "glm4_moe": Style(behind=True, keeps_first=False, feeds_normed=False),
    "qwen3_next": Style(behind=False, keeps_first=True, feeds_normed=True),
    "qwen3_5_text": Style(behind=False, keeps_first=True, feeds_normed=True),
    "qwen3_5_moe_text": Style(behind=False, keeps_first=True, feeds_normed=True),
}


class Mtp(Family):
    """The family of MTP layers."""

    name = "mtp"
    title = "MTP"
    formats = ("target",)
    born_trained = True

    def matches(self, source: Source) -> bool:
        """The layer alone: a whole model that brings one may be a draft model itself."""
        names = source.headers
        body = any(found[1] == "0" for name in names if (found := BEHIND.fullmatch(name)))
        own = any(name.startswith("mtp.") or name.endswith(".eh_proj.weight") for name in names)
        return own and not body

    def describe(self, source: Source) -> DraftInfo:
        parts, style = read_parts(source)
        config = parts.config
        headers = check_whole(
            source,
            self.module_name,
            shapes(parts, style),
            ignored=lambda name: name in SHARED,  # vLLM takes the target's in any case
        )
        return make_info(
            source,
            {**config.to_dict(), "target_hidden_size": config.hidden_size},
            [],
            family="mtp",
            method="mtp",
            format="target",
            layer_ids=(),
            reads="final",
            shared=SHARED,
            draft_vocab_size=config.vocab_size,
            rope=None,  # the target's, as the whole config is
            max_positions=config.max_position_embeddings,
            dtype=headers["eh_proj.weight"].dtype,
        )

    def module_name(self, stored: str) -> str:
        if stored.startswith("mtp."):
            name = stored.removeprefix("mtp.")
            return QWEN_NAMES.get(name, name)
        if found := BEHIND.fullmatch(stored):
            name = BEHIND_NAMES.get(found[2], found[2])
            return name if name in (*OWN, *BEHIND_NAMES.values()) else f"layers.0.{name}"
        return stored.removeprefix("model.").removeprefix("language_model.")

    def load(self, info: DraftInfo, target: TargetInfo | None) -> MtpDraft:
        parts, style = read_parts(open_source(info.folder))
        return fill(build(parts, style), info, self.module_name, target)

    def dump(self, draft: MtpDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The target's config as it is, and the layer by the target's names."""
        import torch

        number, style = draft.parts.number, STYLES[draft.parts.config.model_type]
        return without_quantization(draft.parts.raw), {
            stored_name(name, style, number): tensor.detach()
            .to(torch.float32 if name.endswith(IN_FLOAT32) else dtype)
            .contiguous()
            for name, tensor in draft.state_dict().items()
            if name not in (*SHARED, "d2t")
        }

    def init(self, target: TargetInfo, options: InitOptions) -> MtpDraft:
        """The layer that the target brings, as it is."""
        chosen = (options.num_layers, options.kept, options.intermediate_size)
        if any(one is not None for one in chosen):
            raise UserError(
                "an MTP draft is the target's own layer: its sizes and vocabulary are given",
                hint="leave --layers, --vocab and --intermediate-size out",
            )
        whole = open_source(target.folder)
        parts, style = read_parts(whole)
        source = own_source(whole, parts.config, style)
        check_whole(
            source,
            self.module_name,
            shapes(parts, style),
            ignored=lambda name: name in SHARED,
        )
        draft = build(parts, style)
        state = {self.module_name(name): load_tensor(source, name) for name in source.headers}
        take_from_target(draft, target, None)
        draft.load_state_dict(
            {name: value.float() for name, value in state.items() if name not in SHARED},
            strict=False,
        )
        return draft


def read_parts(source: Source) -> tuple[MtpParts, Style]:
    """What the layer is made of. Raises `UserError` where afaspec does not know it."""
    from transformers import AutoConfig

    folder = source.folder
    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a library boundary: every kind of damaged or foreign config
        raise UserError(
            f"transformers cannot read it ({type(error).__name__}: {first_line(error)})",
            where=source.config_path,
            hint="check that transformers knows this architecture and that the file is whole",
        ) from error
    config = whole.get_text_config()
    style = style_of(config, source.config_path)
    return parts_of(config, style, source), style


def style_of(config: Any, path: Path) -> Style:
    """Raises `UserError` for architectures that afaspec has no MTP layer of, and for several."""
    style = STYLES.get(config.model_type)
    if style is None:
        raise UserError(
            f"is of a {config.model_type}, of which afaspec knows no MTP layer (it knows those of "
            f"{', '.join(STYLES)})",
            where=path,
            hint="serve it as it is (serve --draft mtp), or train an EAGLE-3 draft for the target",
        )
    if getattr(config, "rope_interleave", True) is False:
        raise UserError(
            "says rope_interleave false, which vLLM does not hear in this architecture",
            where=path,
            hint="train an EAGLE-3 draft for the target",
        )
    count = next((n for key in COUNTS if (n := getattr(config, key, None)) is not None), 1)
    if count != 1:
        raise UserError(
            f"has {count} MTP layers; afaspec adapts a single one, which drafts every token",
            where=path,
            hint="serve them as they are (serve --draft mtp), or use a target that brings one"
            if count
            else "this target brings none: train an EAGLE-3 draft for it",
        )
    return style


def own_source(source: Source, config: Any, style: Style) -> Source:
    """The checkpoint with the headers of the MTP layer alone. `UserError` where it has none."""
    first = config.num_hidden_layers

    def is_own(name: str) -> bool:
        behind = BEHIND.fullmatch(name)
        return (
            behind is not None and int(behind[1]) == first
            if style.behind
            else name.startswith("mtp.")
        )

    headers = {name: header for name, header in source.headers.items() if is_own(name)}
    if not headers:
        raise UserError(
            "its config counts an MTP layer, but its tensors have none",
            where=source.folder,
            hint=f"{FETCH}; some conversions leave that layer out",
        )
    return replace(source, headers=headers)


def parts_of(config: Any, style: Style, source: Source) -> MtpParts:
    """transformers' classes of the architecture, found in a model of one layer without values."""
    import torch
    from transformers import AutoModelForCausalLM

    from drafts.families.mtp.module import MtpParts

    number = config.num_hidden_layers if style.behind else 0
    config, small = copy.deepcopy(config), copy.deepcopy(config)
    small.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        small.layer_types = ["full_attention"]
        config.layer_types = ["full_attention"] * (number + 1)
    try:
        with torch.device("meta"):
            decoder = AutoModelForCausalLM.from_config(small).get_decoder()
    except Exception as error:  # a library boundary: sizes that make no model
        raise UserError(
            f"transformers makes no model of it ({type(error).__name__}: {first_line(error)})",
            where=source.config_path,
            hint=FETCH,
        ) from error
    classes = type(decoder.layers[0]), type(decoder.norm), type(decoder.rotary_emb)
    stacked = any(name.endswith("experts.gate_up_proj") for name in source.headers)
    return MtpParts(source.raw, config, *classes, number, stacked)


def build(parts: MtpParts, style: Style) -> MtpDraft:
    """The module, its values not yet there."""
    from drafts.families.mtp.module import MtpDraft

    return MtpDraft(parts, keeps_first=style.keeps_first, feeds_normed=style.feeds_normed)


def shapes(parts: MtpParts, style: Style) -> dict[str, tuple[int, ...]]:
    """Of every tensor that the layer stores, by module name."""
    import torch

    with torch.device("meta"):
        state = build(parts, style).state_dict()
    return {n: tuple(t.shape) for n, t in state.items() if n not in (*SHARED, "d2t")}


def stored_name(name: str, style: Style, number: int) -> str:
    """The target's name of a module's tensor: `Mtp.module_name` the other way round."""
    if not style.behind:
        names = {ours: theirs for theirs, ours in QWEN_NAMES.items()}
        return f"mtp.{names.get(name, name)}"
    names = {ours: theirs for theirs, ours in BEHIND_NAMES.items()}
    return f"model.layers.{number}.{names.get(name, name.removeprefix('layers.0.'))}"
