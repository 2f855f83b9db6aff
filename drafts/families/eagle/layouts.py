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
from drafts.checkpoint.shapes import check_shapes
from drafts.checkpoint.shared import take_from_target
from drafts.checkpoint.source import Source, flatten, is_speculators
from drafts.errors import UserError
from drafts.target import TargetInfo

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.families.eagle.module import EagleConfig, EagleDraft


ARCHITECTURES = ("LlamaForCausalLM", "EagleLlamaForCausalLM")
TARGETS_OWN = ("embed_tokens.weight", "lm_head.weight")
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
        check_tensors(source, flat)
        return make_info(
            source,
            flat,
            source.headers,
            family="eagle",
            method="eagle",
            format="eagle",
            layer_ids=(),
            reads="final",
            dtype=source.headers["fc.weight"].dtype,
        )

    def module_name(self, stored: str) -> str:
        return stored

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
        from drafts.target_head import logit_scale

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


def check_served(source: Source, flat: dict[str, Any]) -> None:
    """Raise `UserError` for what vLLM does not load as an EAGLE draft of Llama layers."""
    named = flat.get("architectures") or []
    if not set(ARCHITECTURES) & set(named):
        raise UserError(
            f"is an EAGLE draft of the architecture {named}, expected {' or '.join(ARCHITECTURES)}",
            where=source.config_path,
            hint=OTHER,
        )
    refuse_bidirectional(flat, source.config_path)
    layer_fields(flat, "eagle", source.config_path)


def check_tensors(source: Source, flat: dict[str, Any]) -> None:
    """Raise `UserError` unless the tensors are exactly those that vLLM takes, of these sizes."""
    size = flat["hidden_size"]
    shapes: dict[str, tuple[int | None, ...]] = {
        "fc.weight": (size, 2 * size),
        "embed_tokens.weight": (flat["vocab_size"], size),
    }
    for i in range(flat.get("num_hidden_layers", 1)):
        shapes |= {f"layers.{i}.{name}": s for name, s in layer_shapes(flat, i).items()}
    check_shapes(source, source.headers, shapes, optional=["embed_tokens.weight"])
    for name in source.headers:
        if name in shapes or name.endswith("rotary_emb.inv_freq"):
            continue
        does = "leaves it out" if name.endswith(".bias") else "refuses it"
        raise UserError(
            f"has the tensor {name}, which an EAGLE draft by this config has not: vLLM {does}",
            where=source.folder,
            hint=OTHER,
        )


def layer_shapes(flat: dict[str, Any], number: int) -> dict[str, tuple[int, ...]]:
    """The shapes of one decoder layer's tensors."""
    fields = layer_fields(flat, "eagle")
    size, inner = fields["hidden_size"], fields["intermediate_size"]
    rows = {
        "q": fields["num_attention_heads"] * fields["head_dim"],
        "k": fields["num_key_value_heads"] * fields["head_dim"],
        "v": fields["num_key_value_heads"] * fields["head_dim"],
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj.weight": (count, size) for name, count in rows.items()
    }
    shapes["self_attn.o_proj.weight"] = (size, rows["q"])
    if fields["qkv_bias"]:
        shapes |= {f"self_attn.{n}_proj.bias": (c,) for n, c in rows.items()}
    if fields["o_bias"]:
        shapes["self_attn.o_proj.bias"] = (size,)
    if fields["mlp_bias"]:
        sizes = {"gate": inner, "up": inner, "down": size}
        shapes |= {f"mlp.{name}_proj.bias": (count,) for name, count in sizes.items()}
    shapes |= {f"mlp.{name}_proj.weight": (inner, size) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (size, inner), "post_attention_layernorm.weight": (size,)}
    if number > 0:
        shapes["input_layernorm.weight"] = (size,)
    return shapes


def config_of(flat: dict[str, Any], target: TargetInfo | None) -> EagleConfig:
    from drafts.families.eagle.module import EagleConfig

    return EagleConfig(
        **layer_fields(flat, "eagle"),
        target_window=target_window(target),
        vocab_size=flat["vocab_size"],
        logit_scale=float(flat.get("logit_scale", 1.0)),
    )
