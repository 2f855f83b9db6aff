"""Quantized weights read as the plain ones that they stand for: FP8 times its scales.

Which scale belongs to which block of a weight is as in vLLM: `compressed-tensors` (float-quantized)
and transformers' `fp8`. Other quantizations are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.errors import UserError
from drafts.tensors import FLOATS, Header

if TYPE_CHECKING:
    from torch import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")
SUFFIXES = ("_scale", "_scale_inv")
# What activations and caches are rounded with: no weight depends on it.
ROUNDING = (".input_scale", ".output_scale", ".k_scale", ".v_scale")
FIELDS = ("quantization_config", "compression_config")
INNER = ("transformer_layer_config", "model", "text_config")
MEND = (
    "give the model as it was before quantization, or in FP8 with its scales (float-quantized of "
    "compressed-tensors, or fp8 of transformers)"
)

Block = tuple[int, int]


@dataclass(frozen=True)
class Scale:
    """The tensor that scales a stored weight, and the rows and columns that share one scale."""

    name: str
    block: Block


def find_scales(raw: dict[str, Any], headers: dict[str, Header], folder: Path) -> dict[str, Scale]:
    """The scale of each quantized weight, by the weight's stored name.

    Raises `UserError` for a quantization that is not known, and for a weight without its scale.
    """
    config = quantization_of(raw)
    blocks = [] if config is None else known_blocks(config, folder / "config.json")
    found = {}
    for name, header in headers.items():
        if header.dtype not in FP8:
            continue
        if config is None:
            raise UserError(
                f"stores {name} as {header.dtype}, but its config names no quantization",
                where=folder,
                hint="write the quantization_config that it was saved with into config.json, or "
                "save it as bfloat16",
            )
        scales = [name + suffix for suffix in SUFFIXES if name + suffix in headers]
        if len(scales) != 1 or len(header.shape) != 2:
            raise UserError(
                f"stores {name} {list(header.shape)} as {header.dtype} with "
                f"{' and '.join(scales) or 'no scale'}, expected one {name}_scale of a matrix",
                where=folder,
                hint=MEND,
            )
        found[name] = Scale(scales[0], block_of(header, scales[0], headers, blocks, folder))
    return found


def quantization_of(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization that a config names, at its top or with the decoder layer's fields."""
    places = [raw, *(raw[key] for key in INNER if isinstance(raw.get(key), dict))]
    return next((place[key] for place in places for key in FIELDS if place.get(key)), None)


def known_blocks(config: dict[str, Any], path: Path) -> list[list[int | None]]:
    """Rows and columns of the blocks that share a scale (None: all), one for each strategy.

    Raises `UserError` for what is not known.
    """
    method, form = str(config.get("quant_method", "")).lower(), config.get("format")
    if method == "fp8":
        size = config.get("weight_block_size")
        return [list(size)] if size else [[None, None], [1, None]]
    groups = config.get("config_groups")
    named = ", ".join(str(part) for part in (method or "no quant_method", form) if part)
    other = [key for key in ("transform_config", "sparsity_config") if is_used(config.get(key))]
    blocks: list[list[int | None]] = []
    for group in groups.values() if isinstance(groups, dict) else [{}]:
        weights = group.get("weights") or {}
        strategies: dict[str, list[int | None] | None] = {
            "tensor": [None, None],
            "channel": [1, None],
            "group": [1, weights.get("group_size")],
            "block": weights.get("block_structure"),
        }
        block = strategies.get(weights.get("strategy") or "tensor")
        bits = f"{weights.get('num_bits')}-bit {weights.get('type')}"
        floats = bits == "8-bit float" and weights.get("symmetric", True)
        forms = {group.get("format") or form} <= {"float-quantized", "naive-quantized", None}
        if method != "compressed-tensors" or other or not (floats and forms and block):
            details = [bits] if weights else []
            raise UserError(
                f"is quantized ({', '.join([named, *details, *other])}), which afaspec cannot undo",
                where=path,
                hint=MEND,
            )
        blocks.append(block)
    return blocks


def is_used(section: Any) -> bool:
    return bool(section) and section.get("format", "") != "dense"


def block_of(
    weight: Header,
    scale: str,
    headers: dict[str, Header],
    blocks: list[list[int | None]],
    folder: Path,
) -> Block:
    """Rows and columns of `weight` that share a scale, from the shape of its scales."""
    (rows, columns), found = weight.shape, headers[scale].shape
    sizes = {(high or rows, wide or columns) for high, wide in blocks}
    grids = {size: (-(-rows // size[0]), -(-columns // size[1])) for size in sizes}
    fitting = [
        size
        for size, (down, across) in grids.items()
        if found in ((down, across), (down,) if across == 1 else None)
        or (found == () and down == across == 1)
    ]
    if len(fitting) != 1 or headers[scale].dtype not in FLOATS:
        raise UserError(
            f"{scale} is {list(found)} of {headers[scale].dtype}, expected "
            f"{' or '.join(str(list(grid)) for grid in grids.values())} of {', '.join(FLOATS)}",
            where=folder,
            hint=MEND,
        )
    return fitting[0]


def plain_headers(
    raw: dict[str, Any], headers: dict[str, Header], scales: dict[str, Scale]
) -> dict[str, Header]:
    """The headers as they are once the weights are dequantized: no scales, and floats."""
    if quantization_of(raw) is None:
        return headers
    places = [raw, *(raw[key] for key in INNER if isinstance(raw.get(key), dict))]
    named = (place.get(key) for place in places for key in ("dtype", "torch_dtype"))
    dtype = next((name for name in named if name in FLOATS), "bfloat16")
    used = {scale.name for scale in scales.values()}
    return {
        name: replace(header, dtype=dtype) if name in scales else header
        for name, header in headers.items()
        if name not in used and not name.endswith(ROUNDING)
    }


def dequantized(weight: Tensor, scales: Tensor, block: Block) -> Tensor:
    """The weight [rows, columns] in float32, each block of it times its scale."""
    rows, columns = weight.shape
    grid = scales.float().reshape(-(-rows // block[0]), -(-columns // block[1]))
    wide = grid.repeat_interleave(block[0], dim=0)[:rows]
    return weight.float() * wide.repeat_interleave(block[1], dim=1)[:, :columns]


def without_quantization(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of the dequantized draft."""
    plain = {key: value for key, value in raw.items() if key not in FIELDS}
    inner = {key: plain[key] for key in INNER if isinstance(plain.get(key), dict)}
    return plain | {k: {f: v for f, v in c.items() if f not in FIELDS} for k, c in inner.items()}
