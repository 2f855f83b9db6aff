"""A Llama-like config.json and `LayerConfig`: each from the other, and from a target."""

from __future__ import annotations

from typing import Any

from drafts.errors import UserError
from drafts.target import TargetInfo, rope_of
from drafts.tensors import dtype_name


def layer_fields(flat: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `LayerConfig` that a Llama-like config gives."""
    heads = flat["num_attention_heads"]
    return {
        "hidden_size": flat["hidden_size"],
        "intermediate_size": flat["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": flat.get("num_key_value_heads") or heads,
        "head_dim": flat.get("head_dim") or flat["hidden_size"] // heads,
        "max_positions": flat.get("max_position_embeddings", 2048),
        "num_layers": flat.get("num_hidden_layers", 1),
        "rope": rope_of(flat),
        "rms_norm_eps": flat.get("rms_norm_eps", 1e-6),
        "hidden_act": flat.get("hidden_act", "silu"),
        "attention_bias": bool(flat.get("attention_bias", False)),
    }


def layer_sizes(
    target: TargetInfo, num_layers: int, intermediate_size: int | None
) -> dict[str, Any]:
    """The arguments of `LayerConfig` for a fresh draft: layers of the target's own sizes.

    `intermediate_size` takes the place of the target's. Raises `UserError` for a target that has
    none (mixtures of experts may know the experts' width only), or no attention heads.
    """
    flat = dict(target.config)
    if intermediate_size is not None:
        flat["intermediate_size"] = intermediate_size
    if not isinstance(flat.get("intermediate_size"), int):
        raise UserError(
            "names no intermediate_size (one number, the width of a dense MLP) for the draft to "
            f"take; it has {', '.join(sorted(k for k in flat if 'intermediate' in k)) or 'none'}",
            where=target.folder / "config.json",
            hint=f"give --intermediate-size: {3 * target.hidden_size} would be 3 times its "
            "hidden size, which is usual",
        )
    if not isinstance(flat.get("num_attention_heads"), int):
        raise UserError(
            "names no num_attention_heads for the draft to take",
            where=target.folder / "config.json",
            hint="use a target with attention layers",
        )
    usual = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False}
    own = {"num_layers": num_layers, "rope": fresh_rope(target.rope)}
    return layer_fields(flat) | usual | own


def fresh_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """A target's rope for a draft that rotates whole heads, by positions in the text alone.

    So the target's sections for images (M-RoPE) go, and so do factors made for a part of a head.
    """
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    partly = rope.get("partial_rotary_factor", 1.0) != 1.0
    if rope["rope_type"] in ("mrope", "proportional") or (partly and "short_factor" in rope):
        return plain
    gone = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
    return {key: value for key, value in rope.items() if key not in gone}


def layer_config(config: Any, dtype: Any) -> dict[str, Any]:
    """A Llama-like config.json of a `LayerConfig`: the opposite of `layer_fields`."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope.get("rope_theta", 10000.0),
        "rope_parameters": dict(config.rope),
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": False,
        "dtype": dtype_name(dtype),
    }
