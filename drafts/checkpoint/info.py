"""What a draft checkpoint is, read from its config and tensor headers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.source import Source
from drafts.hashes import hash_model
from drafts.target.info import SHARED

if TYPE_CHECKING:
    from drafts.nn.interface import Reads


@dataclass(frozen=True)
class DraftInfo:
    """A draft's shape and identity.

    `format` is the layout on disk. `layer_ids` are the target's hidden states that it reads: ()
    for none but the final one, None where the config does not name them. `shared` are the tensors
    that it takes from the target. `max_k` is the most tokens that it drafts in a step, None for any
    number. `speculation` are further settings that vLLM needs. `config` is the checkpoint's, flat.
    `warnings` say what a user should know before serving it. `to_store` are tensors that it takes
    from the target but vLLM from the checkpoint, so that it serves only once they are written.
    """

    folder: Path
    family: str
    format: str
    method: str
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    layer_ids: tuple[int, ...] | None
    max_positions: int | None
    rope: dict[str, Any] | None = field(hash=False)
    dtype: str
    shared: tuple[str, ...]
    config: dict[str, Any] = field(hash=False)
    reads: Reads = "layers"
    max_k: int | None = None
    speculation: dict[str, Any] | None = field(default=None, hash=False)
    warnings: tuple[str, ...] = ()
    to_store: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Of config and weights, read when first asked for."""
        return hash_model(self.folder)


def make_info(
    source: Source, flat: dict[str, Any], names: Iterable[str], **particular: Any
) -> DraftInfo:
    """A `DraftInfo` of a Llama-like `flat` config; `names` are the tensors' module names."""
    names = set(names)
    fields: dict[str, Any] = {
        "folder": source.folder,
        "hidden_size": flat["hidden_size"],
        "target_hidden_size": flat.get("target_hidden_size"),
        "vocab_size": flat["vocab_size"],
        "draft_vocab_size": flat.get("draft_vocab_size"),
        "max_positions": flat.get("max_position_embeddings"),
        "rope": flat.get("rope_parameters"),
        "shared": tuple(name for name in SHARED if name not in names),
        "config": flat,
    }
    return DraftInfo(**fields | particular)
