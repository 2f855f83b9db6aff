"""What a target model is, read from its folder without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.errors import UserError
from drafts.files import hash_model, read_json, weight_files
from drafts.tensors import TensorFile, open_tensors

if TYPE_CHECKING:
    from torch import Tensor


EMBEDDING_NAMES = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")


@dataclass(frozen=True)
class TargetInfo:
    """A target's shape and identity.

    `dtype` is the stored one; `config` is that of the language model; `sha256` covers the weights.
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
    sha256: str


def read_target(folder: Path) -> TargetInfo:
    """Describe the target in `folder`. Raises `UserError` for missing or damaged files."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=folder, hint="give the folder of a saved model")
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)  # multimodal wrappers keep the language model inside
    missing = [key for key in ("hidden_size", "vocab_size", "num_hidden_layers") if key not in text]
    if missing:
        raise UserError(
            f"lacks {', '.join(missing)}, which a causal language model's config has",
            where=folder / "config.json",
            hint="give the target model's folder, not the draft's or the adapter's",
        )
    tensors = open_tensors(folder)
    first = next(iter(tensors.headers.values()))
    return TargetInfo(
        folder=folder,
        model_type=config.get("model_type", "unknown"),
        hidden_size=text["hidden_size"],
        vocab_size=text["vocab_size"],
        num_layers=text["num_hidden_layers"],
        max_positions=text.get("max_position_embeddings", 2048),
        dtype=text.get("dtype") or text.get("torch_dtype") or first.dtype,
        rope=rope_of(text),
        config=text,
        sha256=_hash(str(folder.resolve()), _stamp(folder)),
    )


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rope's type, theta and scaling; of two spellings transformers takes the old one."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if "full_attention" in rope:  # one rope for each kind of layer
        rope = dict(rope["full_attention"])
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def load_embedding(target: TargetInfo) -> Tensor:
    """The target's input embedding [vocab, hidden]."""
    return _first_of(open_tensors(target.folder), EMBEDDING_NAMES)


def load_lm_head(target: TargetInfo) -> Tensor:
    """The target's output matrix [vocab, hidden] (the embedding where they are tied)."""
    return _first_of(open_tensors(target.folder), ("lm_head.weight", *EMBEDDING_NAMES))


def _first_of(tensors: TensorFile, names: tuple[str, ...]) -> Tensor:
    for name in names:
        if name in tensors.headers:
            return tensors.load(name)
    raise UserError(
        f"has none of the tensors {', '.join(names)}",
        where=tensors.folder,
        hint="afaspec knows targets with transformers' usual tensor names; save it with them",
    )


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = [folder / "config.json", *weight_files(folder)]
    return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files))


@lru_cache(maxsize=32)
def _hash(folder: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    return hash_model(Path(folder))


SHARED = {"embed_tokens.weight": load_embedding, "lm_head.weight": load_lm_head}
