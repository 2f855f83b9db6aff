"""What the config.json of several families have in common."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.files import hash_model
from drafts.info import DraftInfo, Source
from drafts.loading import FETCH, SHARED
from drafts.target import TargetInfo, rope_of

REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def flatten(source: Source) -> dict[str, Any]:
    """The config with all fields on one level: speculators nests the decoder layer's.

    Raises `UserError` when a size is missing.
    """
    flat = dict(source.raw)
    if is_speculators(source):
        flat = dict(source.raw.get("transformer_layer_config") or {})
        outer = {k: v for k, v in source.raw.items() if k != "transformer_layer_config"}
        flat |= {k: v for k, v in outer.items() if v is not None}
    missing = [key for key in REQUIRED if key not in flat]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}", where=source.config_path, mend=FETCH)
    flat["target_hidden_size"] = flat.get("target_hidden_size") or flat["hidden_size"]
    flat["draft_vocab_size"] = flat.get("draft_vocab_size") or flat["vocab_size"]
    return flat


def is_speculators(source: Source) -> bool:
    return "speculators_model_type" in source.raw


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


def layer_sizes(target: TargetInfo, num_layers: int) -> dict[str, Any]:
    """The arguments of `LayerConfig` for a fresh draft: layers of the target's own sizes."""
    config = target.config
    heads = config["num_attention_heads"]
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or target.hidden_size // heads,
        "max_positions": target.max_positions,
        "num_layers": num_layers,
        "rope": target.rope,
        "rms_norm_eps": 1e-6,
    }


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
        "dtype": str(dtype).removeprefix("torch."),
    }


def make_info(
    source: Source, flat: dict[str, Any], names: Iterable[str], **particular: Any
) -> DraftInfo:
    """A `DraftInfo` of a Llama-like `flat` config; `names` are the tensors' module names."""
    names = set(names)
    fields: dict[str, Any] = {
        "folder": source.folder,
        "hidden_size": flat["hidden_size"],
        "target_hidden_size": flat["target_hidden_size"],
        "vocab_size": flat["vocab_size"],
        "draft_vocab_size": flat["draft_vocab_size"],
        "max_positions": flat.get("max_position_embeddings", 2048),
        "rope": rope_of(flat),
        "dtype": next(iter(source.headers.values())).dtype,
        "shared": tuple(name for name in SHARED if name not in names),
        "config": flat,
        "sha256": hash_model(source.folder),
    }
    return DraftInfo(**fields | particular)


def check_shapes(
    source: Source,
    names: dict[str, Any],
    expected: dict[str, tuple[int | None, ...]],
    optional: Iterable[str] = ("embed_tokens.weight", "lm_head.weight"),
) -> None:
    """The sizes that the config promises (None: any) are those of the stored tensors.

    `names` holds the headers by module name. Raises `UserError` for the first that is not.
    """
    for name, shape in expected.items():
        if name not in names:
            if name in optional:
                continue
            raise UserError(f"lacks the tensor {name}", where=source.folder, mend=FETCH)
        found = names[name].shape
        if len(found) != len(shape) or any(
            want not in (None, have) for want, have in zip(shape, found, strict=True)
        ):
            raise UserError(
                f"{name} is {list(found)}, the config says {list(shape)}",
                where=source.folder,
                mend=FETCH,
            )


def down_projections(flat: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """The expected shape of each decoder layer's last matrix, by module name."""
    shape = (flat["hidden_size"], flat["intermediate_size"])
    count = flat.get("num_hidden_layers", 1)
    return {f"layers.{i}.mlp.down_proj.weight": shape for i in range(count)}


def check_layer_ids(ids: Any, path: Path, field: str) -> tuple[int, ...] | None:
    """The layer ids that a config names, None for none. Raises `UserError` for odd ones."""
    if not ids:
        return None
    if not all(isinstance(i, int) and i >= 0 for i in ids) or len(set(ids)) != len(ids):
        raise UserError(
            f"{field} is {ids}, expected distinct layer numbers",
            where=path,
            mend="write the layers that the draft was trained on",
        )
    return tuple(ids)


def spread_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Low, middle and high layers for a fresh draft: vLLM's default where they are distinct."""
    usual = default_layer_ids(num_layers)
    if usual[0] < usual[1] < usual[2]:
        return usual
    return tuple(sorted({1, max(num_layers // 2, 1), max(num_layers - 1, 1)}))


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """The layers vLLM takes where an EAGLE-3 draft names none: (2, L//2, L-3)."""
    return (2, num_layers // 2, num_layers - 3)
