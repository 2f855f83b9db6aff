"""Draft models: checkpoints of ordinary causal language models, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions
from drafts.checkpoint.fields import refuse_bidirectional
from drafts.checkpoint.info import DraftInfo, make_info
from drafts.checkpoint.layer_config import GATED, SLIDING, layer_sizes, target_window
from drafts.checkpoint.load import load_causal_lm
from drafts.checkpoint.shapes import check_tensor
from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError
from drafts.quantization import quantization_of
from drafts.rope import LONG
from drafts.target.info import TargetInfo
from drafts.target.weights import load_embedding
from drafts.tensors import dtype_name

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.lm.module import LmDraft


PREFIX = "lm."
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
LONG_ROPES = {"longrope", "su"}
# Their layers have one window in transformers; vLLM takes the target's for it.
OWN_WINDOW_UNHEARD = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
PROBE_TOLERANCE = 1e-4  # of the largest logit: float32 rounding, whatever the kernels


class DraftModel(Family):
    """The family of draft model drafts."""

    name = "draft_model"
    title = "draft model"
    formats = ("transformers",)

    def matches(self, source: Source) -> bool:
        architectures = source.raw.get("architectures") or []
        return any(name.endswith("ForCausalLM") for name in architectures) and (
            any(name.endswith(".embed_tokens.weight") for name in source.headers)
            and any(".layers.0." in name for name in source.headers)
        )

    def describe(self, source: Source) -> DraftInfo:
        flat = dict(source.raw)
        if missing := [key for key in ("hidden_size", "vocab_size") if key not in flat]:
            raise UserError(f"lacks {', '.join(missing)}", where=source.config_path, hint=FETCH)
        refuse_otherwise_served(flat, source.config_path)
        embedding = next(n for n in source.headers if n.endswith(".embed_tokens.weight"))
        size = (flat["vocab_size"], flat["hidden_size"])
        check_served(source, flat)
        for name, header in source.headers.items():
            if name in (embedding, "lm_head.weight"):
                check_tensor(source, name, header, {name: size}, leaves_out=False)
        check_lm(source)
        return make_info(
            source,
            {**flat, "target_hidden_size": flat["hidden_size"], "draft_vocab_size": size[0]},
            [],
            family="draft_model",
            method="draft_model",
            format="transformers",
            layer_ids=(),
            reads="nothing",
            shared=(),
            rope=None,  # its positions are its own business
            max_positions=flat.get("max_position_embeddings"),
            dtype=source.headers[embedding].dtype,
        )

    def module_name(self, stored: str) -> str:
        return PREFIX + stored

    def load(self, info: DraftInfo, target: TargetInfo | None) -> LmDraft:
        from drafts.families.lm.module import LmDraft

        draft = LmDraft(load_lm(info.folder))
        set_window(draft.lm.config, info, target_window(target))
        check_logits(draft, info)
        return draft

    def dump(self, draft: LmDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = json.loads(draft.lm.config.to_json_string(use_diff=True))
        config |= {"architectures": [type(draft.lm).__name__], "dtype": dtype_name(dtype)}
        return config, {
            name.removeprefix(PREFIX): tensor.detach().to(dtype).contiguous()
            for name, tensor in draft.named_parameters()  # each tied tensor once
        }

    def init(self, target: TargetInfo, options: InitOptions) -> LmDraft:
        """A Llama of the target's sizes; vLLM also wants the target's tokenizer files beside it."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from drafts.families.lm.module import LmDraft
        from drafts.target.head import load_lm_head, logit_scale

        if options.kept is not None:
            raise UserError(
                "a draft model has the target's whole vocabulary",
                hint="leave the draft vocabulary out",
            )
        sizes = layer_sizes(target, options.num_layers or 2, options.intermediate_size)
        del sizes["target_window"]
        lm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=target.vocab_size,
                num_hidden_layers=sizes.pop("num_layers"),
                max_position_embeddings=sizes.pop("max_positions"),
                rope_parameters=sizes.pop("rope"),
                tie_word_embeddings=False,
                **sizes,
                **{key: target.config[key] for key in SPECIAL_IDS if key in target.config},
            )
        )
        with torch.no_grad():
            lm.get_input_embeddings().weight.copy_(load_embedding(target).float())
            head = load_lm_head(target).float() * logit_scale(target)  # a Llama has no scale
            lm.get_output_embeddings().weight.copy_(head)
        return LmDraft(lm)


def check_served(source: Source, flat: dict[str, Any]) -> None:
    """Raise `UserError` for a quantized draft model, and one that drafts in one pass."""
    if quantization_of(source.raw) is not None:
        raise UserError(
            "is quantized, so that its weights cannot be read as they are or adapted",
            where=source.config_path,
            hint="use the draft model as it was before quantization",
        )


def check_lm(source: Source) -> None:
    """Raise `UserError` unless transformers makes a model of the config with just these tensors.

    Needs torch and transformers, but reads no weights.
    """
    import torch

    _, wrong, surplus = load_causal_lm(source.folder, torch.float32, "draft model", "meta")
    if wrong:
        raise UserError(
            f"lacks or misshapes {', '.join(wrong[:4])}", where=source.folder, hint=FETCH
        )
    if surplus:
        raise UserError(
            f"has {', '.join(surplus[:4])}, for which its config has no place",
            where=source.folder,
            hint="correct config.json, if a field is missing that asks for these tensors, or use a "
            "draft model without",
        )


def load_lm(folder: Path) -> Any:
    """transformers' model in float32."""
    import torch

    return load_causal_lm(folder, torch.float32, "draft model")[0]


def refuse_otherwise_served(flat: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for config fields of which vLLM makes another forward than transformers."""
    refuse_bidirectional(flat, path)
    slides = flat.get("use_sliding_window") and flat.get("sliding_window", True)
    kinds = flat.get("layer_types")
    if flat.get("model_type") in GATED and slides and (kinds is None or SLIDING in kinds):
        raise UserError(
            "use_sliding_window is true, which vLLM leaves out in this architecture",
            where=path,
            hint='write "use_sliding_window": false if the draft may attend to everything, or use '
            "another draft model",
        )
    rope = flat.get("rope_scaling") or flat.get("rope_parameters") or {}
    if LONG_ROPES & {rope.get("rope_type"), rope.get("type")}:
        raise UserError(
            f"has a rope of the kind {rope.get('rope_type') or rope.get('type')!r}: {LONG}",
            where=path,
            hint="use a draft model with another rope",
        )


def set_window(config: Any, info: DraftInfo, window: int | None) -> None:
    """Give the model the sliding window that vLLM gives it: that of the target, not its own.

    Architectures whose layers are of kinds keep the window of their sliding ones. `window` is
    `target_window`'s. Raises `UserError` where transformers has no window for it.
    """
    kinds = getattr(config, "layer_types", None)
    if config.model_type in OWN_WINDOW_UNHEARD and kinds is None:
        config.sliding_window = window
    elif set(kinds or ()) != {SLIDING} and window is not None and reaches(info, window):
        raise UserError(
            f"would attend to {window} tokens alone: the target's sliding_window is {window}, and "
            "vLLM gives it to the draft model too",
            where=info.folder,
            hint="use a draft of another family for this target, or a Mistral as its draft",
        )


def reaches(info: DraftInfo, window: int) -> bool:
    """Can sequences be longer than the window?"""
    return info.max_positions is None or info.max_positions > window


def check_logits(draft: LmDraft, info: DraftInfo) -> None:
    """Raise `UserError` if the architecture does more to its logits than the module knows of."""
    import torch

    from drafts.nn.packing import Packing

    ids = torch.arange(8) % info.vocab_size
    draft.eval()
    with torch.inference_mode():
        expected = draft.lm(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        found = draft.logits(draft.states(ids, Packing.of([len(ids)])), 0)
    draft.train()
    if (found - expected).abs().max() > PROBE_TOLERANCE * expected.abs().max():
        raise UserError(
            f"{type(draft.lm).__name__} changes its logits in a way that afaspec does not know",
            where=info.folder,
            hint="use a draft model of another architecture",
        )
