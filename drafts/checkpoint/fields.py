"""Which config fields change a draft's forward, and what vLLM makes of those that are left out.

vLLM reads EAGLE's layouts through transformers' config class of the `model_type`, whose defaults
stand for absent fields, and the speculators layout as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.rope import DEFAULT_THETA, read_rope

USUAL = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        **USUAL,
        "num_key_value_heads": None,  # as many as heads
        "head_dim": None,  # the width shared out to the heads
        "max_position_embeddings": 2048,
    },
    "mistral": {
        **USUAL,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
    },
    "qwen2": {
        **USUAL,
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
    },
    "qwen3": {
        **USUAL,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
}
# In the speculators layout no class fills anything in: these are vLLM's Llama layers' own.
BARE: dict[str, dict[str, Any]] = {
    "llama": {
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 8192,
    },
    "qwen3": {"head_dim": None},
}
BARE_THETA = {"llama": DEFAULT_THETA, "qwen3": 1_000_000.0}
NEEDED = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act")
WHOLE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)

# Fields that other modules than vLLM's drafts compute with, and the values that change nothing.
FOREIGN: dict[str, tuple[Any, ...]] = {
    # scales and caps of Granite, Cohere, Gemma, MiniCPM and their like
    "attention_multiplier": (None,),
    "residual_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "lm_head_multiplier": (None, 1),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logits_soft_cap": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_value_scale": (None, 1),
    "clip_qkv": (None,),
    # what attention sees, and where
    "attention_chunk_size": (None,),
    "attn_temperature_tuning": (None, False),
    "sliding_window_pattern": (None, 1),
    "dual_chunk_attention_config": (None,),
    "attention_sink_bias": (None, False),
    "add_swa_attention_sink_bias": (None, False),
    "alibi": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    "position_embedding_type": (None, "rope"),
    # other layers
    "parallel_attn": (None, False),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
    "activation": (None, "silu"),
    "activation_function": (None, "silu"),
    "hidden_activation": (None, "silu"),
    "mlp_hidden_act": (None, "silu"),
    # other names of the rope's fields
    "rope_dim": (None,),
    "rotary_dim": (None,),
    "rotary_pct": (None, 1),
    "rotary_emb_fraction": (None, 1),
    "rotary_emb_base": (None,),
    "rope_interleave": (None, False),
    "rope_interleaved": (None, False),
    "is_neox_style": (None, True),
    "mrope_section": (None,),
    "xdrope_section": (None,),
    "per_layer_config": (None,),
}
# What the speculators layout says inside alone: vLLM does not look for these outside.
INSIDE = {
    *NEEDED,
    *WHOLE,
    *FOREIGN,
    "model_type",
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "layer_types",
    "sliding_window",
    "attention_bias",
    "qkv_bias",
    "bias",
    "mlp_bias",
    "is_causal",
    "logit_scale",
    "eagle_config",
    "dflash_config",
    "num_aux_hidden_states",
    "num_aux_layers",
}
EPSILONS = ("norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "rms_eps")
HINT = "use a draft without, or serve this one as it is: vLLM may compute another than it was made"


def refuse_fields(config: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for a field that would change the forward, but not vLLM's or ours."""
    for field, harmless in FOREIGN.items():
        if config.get(field) not in harmless:
            raise UserError(
                f"{field} is {config[field]!r}, which vLLM's module of this draft does not "
                "compute with, nor afaspec's",
                where=path,
                hint=HINT,
            )
    if config.get("rms_norm_eps") is None:
        for field in EPSILONS:
            if config.get(field) is not None:
                raise UserError(
                    f"has {field} but no rms_norm_eps, which is the one that vLLM reads",
                    where=path,
                    hint=f'write "rms_norm_eps": {config[field]} into it',
                )


def refuse_bidirectional(config: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for a draft whose steps would see what comes after them."""
    if config.get("is_causal") not in (None, True):
        raise UserError(
            "is_causal is false, but this draft writes one token after another",
            where=path,
            hint="remove it, or use a draft whose attention is causal",
        )


def complete(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The decoder layers' fields of a flat config, absent ones filled in as vLLM does.

    `rope_parameters` is then the whole rope, and `rope_scaling` is gone.
    Raises `UserError` for absent fields without a default and for values of the wrong kind.
    """
    refuse_fields(config, path)
    kind = config.get("model_type")
    bare = "speculators_model_type" in config
    if bare:
        kind = kind or "llama"
        defaults, theta = BARE.get(kind, {}), BARE_THETA.get(kind)
        if any(key in config for key in ("rope_scaling", "rope_parameters")):
            theta = DEFAULT_THETA
        elif "rope_theta" not in config and config.get("partial_rotary_factor") is not None:
            raise UserError(
                "has a partial_rotary_factor but no rope_theta: vLLM leaves it out then, in the "
                "speculators layout",
                where=path,
                hint='write "rope_theta" as the draft was trained',
            )
    else:
        defaults = DEFAULTS.get(str(kind), {})
        theta = DEFAULT_THETA if defaults else None
    full = {**defaults, **config}
    heads = full["num_attention_heads"]
    null = bare and "num_key_value_heads" in config  # which stays null there, and fails
    if full.get("num_key_value_heads") is None and "num_key_value_heads" in defaults and not null:
        full["num_key_value_heads"] = heads
    if full.get("head_dim") is None and defaults.get("head_dim", 0) is None:
        full["head_dim"] = full["hidden_size"] // heads
    needed = NEEDED if "head_dim" in defaults else (*NEEDED, "head_dim")
    if missing := [field for field in needed if full.get(field) is None]:
        named = "the speculators layout" if bare else f"model_type {kind!r}"
        raise UserError(
            f"lacks {', '.join(missing)}, for which {named} has no default that afaspec knows",
            where=path,
            hint="write the values that the draft was trained with",
        )
    check_values(full, path)
    rope = read_rope(full, path, theta=theta, later=bare)
    rotated = int(full["head_dim"] * rope.get("partial_rotary_factor", 1.0))
    if not 0 < rotated <= full["head_dim"] or rotated % 2:
        raise UserError(
            f"partial_rotary_factor is {rope.get('partial_rotary_factor', 1.0)}, which rotates "
            f"{rotated} of the {full['head_dim']} channels of a head",
            where=path,
            hint="write a factor above 0 and at most 1 that gives an even number",
        )
    full |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    full.pop("rope_scaling", None)
    return full


def check_values(full: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for sizes that are none, and for an activation that vLLM has not."""
    for field in WHOLE:
        value = full[field]
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(
                f"{field} is {value!r}, expected a number above 0",
                where=path,
                hint="write the value that the draft was trained with",
            )
    eps = full["rms_norm_eps"]
    if isinstance(eps, bool) or not isinstance(eps, int | float) or eps < 0:
        raise UserError(
            f"rms_norm_eps is {eps!r}, expected a small number",
            where=path,
            hint="write the value that the draft was trained with",
        )
    if full["hidden_act"] != "silu":
        raise UserError(
            f"hidden_act is {full['hidden_act']}, but vLLM has only silu in a draft's layers",
            where=path,
            hint="use a draft with silu, or train one: afaspec has the same layers",
        )
