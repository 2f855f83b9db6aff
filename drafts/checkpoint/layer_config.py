"""A Llama-like config.json and `LayerConfig`: each from the other, and from a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from drafts.checkpoint.fields import DEFAULTS
from drafts.errors import UserError
from drafts.rope import read_rope
from drafts.target.info import TargetInfo
from drafts.tensors import dtype_name

# What a config may leave to its reader, and a complete one has.
UNSTATED = (
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_theta",
    "rope_parameters",
)
Layers = Literal["llama", "qwen3", "eagle", "dflash"]  # the modules that vLLM has for drafts
HEADS = "num_attention_heads"
SLIDING, FULL = "sliding_attention", "full_attention"
GATED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")  # their window counts with use_sliding_window
# Targets whose layers all have the one window where their config names no layer_types.
ONE_WINDOW = ("llama", "mistral", "mixtral", "phi3", "phimoe", "starcoder2", "qwen3_moe")
CLASS_WINDOW = 4096  # of Mistral's and Qwen's configs that leave sliding_window out
MAX_WINDOW_LAYERS = 28  # of Qwen's: how many first layers have no window


def layer_fields(flat: dict[str, Any], layers: Layers, path: Path | None = None) -> dict[str, Any]:
    """The arguments of `LayerConfig` that a complete config (`drafts.checkpoint.fields`) gives.

    `layers` is the module that vLLM serves it with: it decides which biases and windows count.
    Raises `UserError` for windows that vLLM fails on, of the config at `path`.
    """
    return {
        "hidden_size": flat["hidden_size"],
        "intermediate_size": flat["intermediate_size"],
        "num_attention_heads": flat["num_attention_heads"],
        "num_key_value_heads": flat["num_key_value_heads"],
        "head_dim": flat["head_dim"],
        "max_positions": flat["max_position_embeddings"],
        "num_layers": flat["num_hidden_layers"],
        "rope": flat["rope_parameters"],
        "rms_norm_eps": flat["rms_norm_eps"],
        "windows": read_windows(flat, layers, path),
        **read_biases(flat, layers),
    }


def read_biases(flat: dict[str, Any], layers: Layers) -> dict[str, bool]:
    """Which linear layers have biases, by vLLM's modules: each reads other fields."""
    attention, either = bool(flat.get("attention_bias")), bool(flat.get("bias"))
    if layers == "dflash":
        return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": False}
    if layers == "qwen3":
        return {"qkv_bias": attention, "o_bias": False, "mlp_bias": False}
    inputs = attention
    if layers == "eagle":
        inputs = bool(flat.get("qkv_bias", attention or either))
    return {
        "qkv_bias": inputs,
        "o_bias": attention or either,
        "mlp_bias": bool(flat.get("mlp_bias")),
    }


def read_windows(
    flat: dict[str, Any], layers: Layers, path: Path | None = None
) -> tuple[int | None, ...]:
    """The sliding window of each layer, () where none has one: only `layer_types` give them.

    Raises `UserError` for those that vLLM fails on.
    """
    types, nested = layer_types(flat, path), flat.get("dflash_config") or {}
    if layers == "eagle":
        if types is None:
            return ()
        raise UserError(
            f"layer_types is {types}, which vLLM counts from the target's first layer on for an "
            "EAGLE draft, and fails (model_type qwen2 and qwen3 imply it)",
            where=path,
            hint="leave it out, with model_type llama, if no layer slides; else use an EAGLE-3 "
            "draft",
        )
    sliding = [kind == SLIDING for kind in types or [FULL] * flat["num_hidden_layers"]]
    window, field = _window(flat), "sliding_window"
    if layers == "dflash":
        if nested.get("use_swa") and not any(sliding):
            sliding = [True] * len(sliding)
        if "swa_window_size" in nested:
            window, field = nested["swa_window_size"], "dflash_config.swa_window_size"
    if not any(sliding):
        return ()
    if layers == "qwen3" and window is None and _has_class(flat):
        return ()  # so transformers reads Qwen's own config: without use_sliding_window, no window
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        raise UserError(
            f"has sliding layers, but {field} is {window!r}",
            where=path,
            hint="write the window that the draft was trained with, in tokens (and with the "
            'model_type qwen3 also "use_sliding_window": true)',
        )
    return tuple(window if slides else None for slides in sliding)


def layer_types(flat: dict[str, Any], path: Path | None = None) -> list[str] | None:
    """The kind of each layer where the config or its class names them.

    Raises `UserError` for kinds that no draft has, or for too many or few.
    """
    types, count = flat.get("layer_types"), flat["num_hidden_layers"]
    if types is None:
        if not _has_class(flat) or flat.get("model_type") not in ("qwen2", "qwen3"):
            return None
        first, window = flat.get("max_window_layers", MAX_WINDOW_LAYERS), _window(flat)
        return [SLIDING if window is not None and i >= first else FULL for i in range(count)]
    if not isinstance(types, list) or len(types) != count or set(types) - {SLIDING, FULL}:
        raise UserError(
            f"layer_types is {types}, expected {SLIDING} or {FULL} for each of {count} layers",
            where=path,
            hint="write the kind of each of the draft's layers, or leave layer_types out",
        )
    return types


def _window(flat: dict[str, Any]) -> Any:
    """`sliding_window` as the config's class has it."""
    kind = flat.get("model_type") if _has_class(flat) else None
    if kind in GATED and not flat.get("use_sliding_window"):
        return None
    return flat.get("sliding_window", CLASS_WINDOW if kind in (*GATED, "mistral") else None)


def _has_class(flat: dict[str, Any]) -> bool:
    """Is the config read through transformers' class, which fills in what is absent?"""
    return "speculators_model_type" not in flat


def target_window(target: TargetInfo | None) -> int | None:
    """The sliding window of a target whose layers all have the same one, else None.

    vLLM keeps it as the whole engine's, and so the draft's layers have it too, those of a kind
    of their own excepted.
    """
    if target is None:
        return None
    config = target.config
    kind, types = config.get("model_type", target.model_type), config.get("layer_types")
    window = config.get("sliding_window", CLASS_WINDOW if kind in (*GATED, "mistral") else None)
    if kind in GATED and not config.get("use_sliding_window"):
        return None
    if types is None and kind in GATED[:3]:
        slides = config.get("max_window_layers", MAX_WINDOW_LAYERS) <= 0
    elif types is None:
        slides = kind in ONE_WINDOW
    else:
        slides = set(types) == {SLIDING}
    return window or None if slides else None


def layer_sizes(
    target: TargetInfo, num_layers: int, intermediate_size: int | None
) -> dict[str, Any]:
    """The arguments of `LayerConfig` for a fresh draft: layers of the target's own sizes.

    `intermediate_size` takes the place of the target's. Raises `UserError` for a target that has
    none (mixtures of experts may know the experts' width only), or no attention heads.
    """
    config = {**DEFAULTS.get(target.model_type, {}), **target.config}
    width, heads = intermediate_size or config.get("intermediate_size"), config.get(HEADS)
    if not isinstance(width, int):
        named = ", ".join(sorted(key for key in config if "intermediate" in key)) or "none"
        raise UserError(
            "names no intermediate_size (one number, the width of a dense MLP) for the draft to "
            f"take; it has {named}",
            where=target.folder / "config.json",
            hint=f"give --intermediate-size: {3 * target.hidden_size} would be 3 times its "
            "hidden size, which is usual",
        )
    if not isinstance(heads, int):
        raise UserError(
            f"names no {HEADS} for the draft to take",
            where=target.folder / "config.json",
            hint="use a target with attention layers",
        )
    positions = config.get("max_position_embeddings") or 2048
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "max_positions": positions,
        "num_layers": num_layers,
        "rope": fresh_rope(target.rope, positions, target.folder),
        "rms_norm_eps": 1e-6,
        "target_window": target_window(target),
    }


def fresh_rope(rope: dict[str, Any], positions: int, path: Path) -> dict[str, Any]:
    """A target's rope for a draft that rotates whole heads, by positions in the text alone.

    So the target's sections for images (M-RoPE) go, and so do factors made for a part of a head.
    A rope that drafts cannot have becomes the plain one of the same theta.
    """
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and "short_factor" in rope:
        return plain
    gone = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
    kept = {key: value for key, value in rope.items() if key not in gone}
    try:
        whole = {"rope_parameters": kept, "max_position_embeddings": positions}
        return read_rope(whole, path, theta=None)
    except UserError:
        return plain


def layer_config(config: Any, dtype: Any) -> dict[str, Any]:
    """A Llama-like config.json of a `LayerConfig`: the opposite of `layer_fields`."""
    fields = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "rope_theta": config.rope.get("rope_theta", 10000.0),
        "rope_parameters": dict(config.rope),
        "tie_word_embeddings": False,
        "dtype": dtype_name(dtype),
    }
    return fields | bias_fields(config) | window_fields(config.windows)


def unstated_fields(flat: dict[str, Any], layers: Layers) -> dict[str, Any]:
    """What a layout leaves to the defaults of a class, of the complete config `flat`.

    Another layout has other defaults, or none. `rope_scaling` is to be left out beside it.
    """
    full = {name: flat[name] for name in UNSTATED}
    full["attention_bias"] = bool(flat.get("attention_bias"))
    full |= {"model_type": flat.get("model_type") or "llama"}
    windows = read_windows(flat, layers)
    if not windows and (flat.get("layer_types") or flat.get("use_sliding_window")):
        full["layer_types"] = [FULL] * flat["num_hidden_layers"]
    return full | window_fields(windows)


def bias_fields(config: Any) -> dict[str, bool]:
    """The fields that `read_biases` makes a `LayerConfig`'s biases of."""
    fields = {"attention_bias": config.qkv_bias}
    if not config.qk_norm and config.o_bias != config.qkv_bias:  # as only Llama's layers can
        fields |= {"attention_bias": False, "qkv_bias": config.qkv_bias, "bias": config.o_bias}
    return fields | ({"mlp_bias": True} if config.mlp_bias else {})


def window_fields(windows: tuple[int | None, ...]) -> dict[str, Any]:
    """The fields that `read_windows` makes these windows of."""
    if not windows:
        return {}
    return {
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": next(filter(None, windows)),
        "use_sliding_window": True,
    }
