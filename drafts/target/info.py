"""What a target model is, read from its folder without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.files import read_json
from drafts.hashes import hash_model
from drafts.tensors import open_tensors

SHARED = ("embed_tokens.weight", "lm_head.weight")  # what a draft may take from its target
SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")
LEFT_OUT = (*SIZES, "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class TargetInfo:
    """A target's shape and identity.

    `dtype` is the stored one; `config` is that of the language model.
    """

    folder: Path
    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_positions: int
    dtype: str
    rope: dict[str, Any] = field(hash=False)
    config: dict[str, Any] = field(hash=False)

    @cached_property
    def sha256(self) -> str:
        """Of config and weights, read when first asked for."""
        return hash_model(self.folder)


def read_target(folder: Path) -> TargetInfo:
    """Describe the target in `folder`. Raises `UserError` for missing or damaged files."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, hint="give the folder of a saved model")
    config = read_json(folder / "config.json")
    text = text_config(config, folder)
    missing = [key for key in SIZES if key not in text]
    if missing:
        raise UserError(
            f"lacks {', '.join(missing)}, which a causal language model's config has",
            where=folder / "config.json",
            hint="give the target model's folder, not the draft's or the adapter's",
        )
    tensors = open_tensors(folder)
    first = next(iter(tensors.headers.values()))
    named = (of.get(key) for of in (text, config) for key in ("dtype", "torch_dtype"))
    return TargetInfo(
        folder=folder,
        model_type=config.get("model_type", "unknown"),
        hidden_size=text["hidden_size"],
        vocab_size=text["vocab_size"],
        num_layers=text["num_hidden_layers"],
        max_positions=text.get("max_position_embeddings", 2048),
        dtype=next(filter(None, named), first.dtype),
        rope=rope_of(text),
        config=text,
    )


def text_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The language model's config, which multimodal models keep inside theirs.

    There transformers leaves out what is its own default, which is filled in.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    if all(key in text for key in LEFT_OUT):
        return text
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # whatever a foreign or damaged config makes the library raise
        return text
    return {**whole.get_text_config().to_dict(), **text}


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rope's type, theta and scaling; of two spellings transformers takes the old one."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "full_attention" in rope:  # one rope for each kind of layer
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope
