"""A target's embedding and output layer, found under the names that transformers' models have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drafts.errors import UserError
from drafts.files import read_json
from drafts.quantization import FP8, SUFFIXES, dequantized, find_scales
from drafts.target.info import TargetInfo
from drafts.tensors import FLOATS, TensorFile, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

# Of Llama and most others, GPT-NeoX, and Mamba; multimodal models put a prefix in front.
PARTS = r"\.(bias|q?weight.*)"
EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|embed_in|embeddings)" + PARTS)
HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)" + PARTS)
OTHERS = re.compile(r"(^|\.)(layers|mtp|talker|visual|vision\w*|audio\w*)\.")  # have some as well
UNQUANTIZED = "give the target as it was before quantization"


@dataclass(frozen=True)
class StoredHead:
    """The output layer as it is stored; neither where the target has none of its own."""

    weight: str | None
    bias: str | None


def load_embedding(target: TargetInfo) -> Tensor:
    """The target's input embedding [vocab, hidden]. Raises `UserError` for none, or several."""
    tensors = open_tensors(target.folder)
    return load_matrix(target, tensors, find_weight(tensors, EMBEDDING, "embedding", target))


def find_head(target: TargetInfo) -> StoredHead:
    """The names of the output layer's tensors. Raises `UserError` for one that is packed."""
    tensors = open_tensors(target.folder)
    names = parts(tensors, HEAD)
    if not names:
        return StoredHead(None, None)
    bias = next((name for name, part in names.items() if part == "bias"), None)
    return StoredHead(find_weight(tensors, HEAD, "output layer", target), bias)


def load_matrix(target: TargetInfo, tensors: TensorFile, name: str) -> Tensor:
    """The stored matrix [vocab, hidden]; one in FP8 times its scales, in float32.

    Raises `UserError` for other sizes than the config's, and for another quantization.
    """
    header, folder = tensors.headers[name], target.folder
    scales = [name + suffix for suffix in SUFFIXES if name + suffix in tensors.headers]
    known = not scales if header.dtype in (*FLOATS, "float64") else header.dtype in FP8
    if not known:
        found = f"of type {header.dtype} with {', '.join(scales) or 'no scale'}"
        raise UserError(
            f"{name} is quantized in a way that afaspec does not know ({found})",
            where=folder,
            hint=UNQUANTIZED,
        )
    size = (target.vocab_size, target.hidden_size)
    if header.shape != size:
        raise UserError(
            f"{name} is {list(header.shape)}, the config says {list(size)}",
            where=folder,
            hint="fetch the model again: config and weights do not belong together",
        )
    matrix = tensors.load(name)
    if header.dtype not in FP8:
        return matrix
    own = {part: tensors.headers[part] for part in (name, *scales)}
    scale = find_scales(read_json(folder / "config.json"), own, folder)[name]
    return dequantized(matrix, tensors.load(scale.name), scale.block)


def parts(tensors: TensorFile, layer: re.Pattern[str]) -> dict[str, str]:
    """The stored tensors of a layer: what follows its name, by whole name."""
    found = ((name, layer.fullmatch(name)) for name in tensors.headers if not OTHERS.search(name))
    return {name: match[1] for name, match in found if match}


def find_weight(tensors: TensorFile, layer: re.Pattern[str], what: str, target: TargetInfo) -> str:
    """The name of a layer's weight: the only one, or the only one of the config's size."""
    names = parts(tensors, layer)
    weights = [name for name, part in names.items() if part == "weight"]
    size = (target.vocab_size, target.hidden_size)
    fitting = [name for name in weights if tensors.headers[name].shape == size]
    if len(weights) == 1 or len(fitting) == 1:
        return (fitting or weights)[0]
    if names and not weights:
        problem = f"its {what} is quantized: it is stored as {next(iter(names))}"
        hint = UNQUANTIZED
    else:
        found = f"several: {', '.join(weights)}" if weights else "none"
        problem = f"has no {what} of a name that afaspec knows (found {found})"
        hint = "use a target of transformers' usual tensor names, such as model.embed_tokens.weight"
    raise UserError(problem, where=target.folder, hint=hint)
