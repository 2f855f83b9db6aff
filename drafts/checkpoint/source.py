"""An opened checkpoint, and its config on one level."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafts.checkpoint.fields import INSIDE, complete
from drafts.errors import UserError
from drafts.tensors import Header

REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def flatten(source: Source) -> dict[str, Any]:
    """The config with all fields on one level, and the decoder layers' complete.

    speculators nests the decoder layers' fields, and vLLM reads those there alone.
    Raises `UserError` when a size is missing, and for fields that change the forward unheard.
    """
    flat = dict(source.raw)
    if is_speculators(source):
        flat = dict(source.raw.get("transformer_layer_config") or {})
        outer = {k: v for k, v in source.raw.items() if k != "transformer_layer_config"}
        flat |= {k: v for k, v in outer.items() if v is not None and k not in INSIDE}
    missing = [key for key in REQUIRED if key not in flat]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}", where=source.config_path, hint=FETCH)
    flat["target_hidden_size"] = flat.get("target_hidden_size") or flat["hidden_size"]
    flat["draft_vocab_size"] = flat.get("draft_vocab_size") or flat["vocab_size"]
    return complete(flat, source.config_path)


def is_speculators(source: Source) -> bool:
    return "speculators_model_type" in source.raw


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its raw config, and its tensors' headers by stored name."""

    folder: Path
    raw: dict[str, Any]
    headers: dict[str, Header]

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"


FETCH = "download the draft again, or check that it is a draft of this family"
