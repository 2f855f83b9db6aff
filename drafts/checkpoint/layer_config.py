"""A Llama-like config.json and `LayerConfig`: each from the other, and from a target."""

from __future__ import annotations

from typing import Any

from drafts.target import TargetInfo, rope_of
from drafts.tensors import dtype_name

NAMES = {  # in config.json, of the fields of `LayerConfig` that it may leave out
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "rope_parameters": "rope",
    "rms_norm_eps": "rms_norm_eps",
    "hidden_act": "hidden_act",
    "attention_bias": "attention_bias",
}


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


def unstated_fields(flat: dict[str, Any]) -> dict[str, Any]:
    """What a Llama-like config.json leaves to its reader, with the values that it has here."""
    fields = layer_fields(flat)
    given = {name for name in NAMES if flat.get(name) is not None}
    if flat.get("rope_scaling"):
        given.add("rope_parameters")
    return {name: fields[own] for name, own in NAMES.items() if name not in given}


def layer_sizes(target: TargetInfo, num_layers: int) -> dict[str, Any]:
    """The arguments of `LayerConfig` for a fresh draft: layers of the target's own sizes."""
    usual = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False}
    return layer_fields(target.config) | usual | {"num_layers": num_layers}


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
