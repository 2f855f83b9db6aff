"""EAGLE checkpoints: `fc`, decoder layers of which the first lacks its input norm, no more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.family import Family, InitOptions
from drafts.checkpoint.fields import refuse_bidirectional
from drafts.checkpoint.info import DraftInfo, make_info
from drafts.checkpoint.layer_config import (
    layer_config,
    layer_fields,
    layer_sizes,
    target_window,
)
from drafts.checkpoint.load import fill
from drafts.checkpoint.shapes import Shapes, check_whole, layer_shapes, prefixed
from drafts.checkpoint.shared import take_from_target
from drafts.checkpoint.source import Source, flatten, is_speculators, load_tensor
from drafts.errors import UserError
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.eagle.module import EagleConfig, EagleDraft


ARCHITECTURES = ("LlamaForCausalLM", "EagleLlamaForCausalLM")
TARGETS_OWN = ("embed_tokens.weight", "lm_head.weight")
NO_OUTPUT_BIAS = (
    "its config asks for o_proj.bias, but it has none: vLLM computes with what its memory "
    'holds there. Write "bias": false, "attention_bias": false and "qkv_bias": true into '
    "config.json; `afaspec merge` does"
)
INNER_ONLY = (
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "partial_rotary_factor",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
)
OTHER = "use an EAGLE draft that vLLM serves, or train one: afaspec has the same layers"


class Eagle(Family):
    """The family of EAGLE drafts."""

    name = "eagle"
    title = "EAGLE"
    formats = ("eagle",)

    def matches(self, source: Source) -> bool:
        """By the tensors: the config is that of any Llama."""
        fc = source.headers.get("fc.weight")
        if fc is None or len(fc.shape) != 2 or fc.shape[1] != 2 * fc.shape[0]:
            return False
        others = any("hidden_norm" in name or name == "d2t" for name in source.headers)
        return not is_speculators(source) and not others

    def describe(self, source: Source) -> DraftInfo:
        source = unnested(source)
        flat = flatten(source)
        flat["target_hidden_size"] = flat["hidden_size"]
        flat["draft_vocab_size"] = flat["vocab_size"]  # vLLM knows no other here
        check_served(source, flat)
        unread = lacks_output_biases(source, flat)
        flat |= unread
        names = check_whole(
            source,
            self.module_name,
            own_shapes(flat),
            shared=TARGETS_OWN,
            ignored=lambda name: name == "fc.bias" and is_zero(source, name),
        )
        return make_info(
            source,
            flat,
            names,
            family="eagle",
            method="eagle",
            format="eagle",
            layer_ids=(),
            reads="final",
            warnings=(NO_OUTPUT_BIAS,) if unread else (),
            dtype=names["fc.weight"].dtype,
        )

    def module_name(self, stored: str) -> str:
        return stored

    def written_config(self, info: DraftInfo, raw: dict[str, Any]) -> dict[str, Any]:
        names = ("attention_bias", "bias", "qkv_bias") if NO_OUTPUT_BIAS in info.warnings else ()
        return super().written_config(info, raw) | {name: info.config[name] for name in names}

    def load(self, info: DraftInfo, target: TargetInfo | None) -> EagleDraft:
        from drafts.families.eagle.module import EagleDraft

        return fill(EagleDraft(config_of(info.config, target)), info, self.module_name, target)

    def dump(self, draft: EagleDraft, dtype: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All but the embedding and the output layer, which are the target's."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **layer_config(draft.config, dtype),
            "vocab_size": draft.config.vocab_size,
            "logit_scale": draft.config.logit_scale,
        }
        own = {n: p for n, p in draft.named_parameters() if n not in TARGETS_OWN}
        return config, {n: p.detach().to(dtype).contiguous() for n, p in own.items()}

    def init(self, target: TargetInfo, options: InitOptions) -> EagleDraft:
        """A random draft. Its vocabulary is always full."""
        from drafts.families.eagle.module import EagleConfig, EagleDraft
        from drafts.nn.layers import init_linears
        from drafts.target.head import logit_scale

        if options.kept is not None:
            raise UserError(
                "vLLM has no vocabulary map for EAGLE drafts, so that none can be reduced",
                hint="leave the vocabulary full, or choose the family eagle3",
            )
        sizes = layer_sizes(target, options.num_layers or 1, options.intermediate_size)
        scale = logit_scale(target)  # vLLM takes the head from the target, the scale from the draft
        draft = EagleDraft(EagleConfig(**sizes, vocab_size=target.vocab_size, logit_scale=scale))
        init_linears(draft)
        take_from_target(draft, target, None)
        return draft


def unnested(source: Source) -> Source:
    """With the decoder layer's config, which model type "eagle" nests, on the outer level.

    Raises `UserError` for a rope or windows outside, of which vLLM takes others than it seems.
    """
    inner = source.raw.get("model")
    if not isinstance(inner, dict):
        return source
    outer = {k: v for k, v in source.raw.items() if k not in ("model", "architectures")}
    if strays := sorted(key for key in outer if key in INNER_ONLY and outer[key] != inner.get(key)):
        raise UserError(
            f"says {', '.join(strays)} outside of `model`, where vLLM reads the layers' own",
            where=source.config_path,
            hint=f"move {', '.join(strays)} into `model`",
        )
    kind = inner.get("model_type", "llama")
    return replace(source, raw={**inner, **outer, "model_type": kind})


def lacks_output_biases(source: Source, flat: dict[str, Any]) -> dict[str, bool]:
    """The fields that make the biases of queries, keys and values alone, {} where all are there.

    So EAGLE's own code has it: its `bias` is that of `fc`. vLLM makes one of `o_proj` of it, and
    leaves that as its memory is where the checkpoint has none.
    """
    fields = layer_fields(flat, "eagle", source.config_path)
    if not fields["o_bias"] or any(name.endswith("o_proj.bias") for name in source.headers):
        return {}
    if not any(name.endswith("q_proj.bias") for name in source.headers):
        return {}
    return {"attention_bias": False, "bias": False, "qkv_bias": True}


def is_zero(source: Source, name: str) -> bool:
    """Is a stored tensor all zeros, so that vLLM, which leaves it out, computes the same?"""
    return not load_tensor(source, name).any()


def check_served(source: Source, flat: dict[str, Any]) -> None:
    """Raise `UserError` for what vLLM does not load as an EAGLE draft of Llama layers."""
    named = flat.get("architectures") or []
    if not set(ARCHITECTURES) & set(named):
        raise UserError(
            f"is an EAGLE draft of the architecture {named}, expected {' or '.join(ARCHITECTURES)}",
            where=source.config_path,
            hint=OTHER if named else f'write "architectures": ["{ARCHITECTURES[0]}"] into it',
        )
    refuse_bidirectional(flat, source.config_path)
    layer_fields(flat, "eagle", source.config_path)


def shapes(flat: dict[str, Any]) -> Shapes:
    """The tensors of the module that this config makes."""
    fields, size = layer_fields(flat, "eagle"), flat["hidden_size"]
    made: Shapes = {
        "fc.weight": (size, 2 * size),
        "embed_tokens.weight": (flat["vocab_size"], size),
        "lm_head.weight": (flat["vocab_size"], size),
    }
    for i in range(fields["num_layers"]):
        made |= prefixed(f"layers.{i}", layer_shapes(fields, input_norm=i > 0))
    return made


def own_shapes(flat: dict[str, Any]) -> Shapes:
    """Those that a checkpoint may store: the output layer is always the target's."""
    return {name: shape for name, shape in shapes(flat).items() if name != "lm_head.weight"}


def config_of(flat: dict[str, Any], target: TargetInfo | None) -> EagleConfig:
    from drafts.families.eagle.module import EagleConfig

    return EagleConfig(
        **layer_fields(flat, "eagle"),
        target_window=target_window(target),
        vocab_size=flat["vocab_size"],
        logit_scale=float(flat.get("logit_scale", 1.0)),
    )
