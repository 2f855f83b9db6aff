"""An opened checkpoint: its config, its tensors' headers, and their values on demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.checkpoint.fields import INSIDE, complete
from drafts.errors import UserError
from drafts.files import read_json
from drafts.quantization import Scale, dequantized, find_scales, plain_headers
from drafts.tensors import Header, TensorFile, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

FETCH = "download the draft again, or check that it is a draft of this family"
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its raw config, and its tensors' headers by stored name.

    `headers` are those of plain weights, `stored` those on disk: the two differ where weights are
    quantized, with `scales` by the weight's name.
    """

    folder: Path
    raw: dict[str, Any]
    headers: dict[str, Header]
    stored: dict[str, Header]
    scales: dict[str, Scale] = field(default_factory=dict)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"


def open_source(folder: Path) -> Source:
    """Open the checkpoint in `folder`. Raises `UserError` for damaged files and unknown codes."""
    raw, stored = read_json(folder / "config.json"), open_tensors(folder).headers
    if not isinstance(raw, dict):
        raise UserError("is no model's config", where=folder / "config.json", hint=FETCH)
    scales = find_scales(raw, stored, folder)
    return Source(folder, raw, plain_headers(raw, stored, scales), stored, scales)


def load_tensor(source: Source, name: str) -> Tensor:
    """The plain tensor of a stored name: as stored, or dequantized in float32."""
    file = TensorFile(source.folder, source.stored)
    tensor = file.load(name)
    scale = source.scales.get(name)
    return tensor if scale is None else dequantized(tensor, file.load(scale.name), scale.block)


def load_tensors(source: Source) -> dict[str, Tensor]:
    """All plain tensors by stored name."""
    return {name: load_tensor(source, name) for name in source.headers}


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
