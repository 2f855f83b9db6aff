"""Shipped weights: linear layers as int4 or int8 groups in compressed-tensors' packed layout.

The unpacked model *is* the model: it is trained with its weights already rounded
(straight-through), so packing loses nothing that evaluation saw.
Format: compressed-tensors `pack-quantized`, symmetric, one scale per group of input columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUP = 64


def group_scales(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Scale of each group, [out, in / group], bf16-rounded as it will be stored."""
    top = 2 ** (bits - 1) - 1
    peak = weight.float().unflatten(1, (-1, group)).abs().amax(-1)
    return (peak / top).clamp_min(1e-8).to(torch.bfloat16)


def round_to_grid(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """`weight` [out, in] rounded to what its packed form unpacks to, in bf16 values."""
    codes, scales = quantize(weight, bits, group)
    return dequantize(codes, scales, group).to(weight.dtype)


def quantize(weight: Tensor, bits: int, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Integer codes [out, in] (int8) and scales [out, in / group] (bf16)."""
    top = 2 ** (bits - 1) - 1
    scales = group_scales(weight, bits, group)
    ratio = weight.float().unflatten(1, (-1, group)) / scales.float().unsqueeze(-1)
    return ratio.round().clamp(-top, top).flatten(1).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor, group: int = GROUP) -> Tensor:
    """The bf16 weight [out, in] that codes and scales stand for."""
    values = codes.unflatten(1, (-1, group)).float() * scales.float().unsqueeze(-1)
    return values.flatten(1).to(torch.bfloat16)


def pack_state(state: dict[str, Tensor], bits: dict[str, int]) -> dict[str, Tensor]:
    """Replace each weight named in `bits` by its packed tensors; the others become bf16."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = {}
    for name, tensor in state.items():
        if name not in bits:
            packed[name] = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            continue
        codes, scales = quantize(tensor, bits[name])
        packed[f"{name}_packed"] = pack_to_int32(codes, bits[name])
        packed[f"{name}_scale"] = scales
        packed[f"{name}_shape"] = torch.tensor(tensor.shape)
    return packed


def unpack_state(packed: dict[str, Tensor], bits: dict[str, int]) -> dict[str, Any]:
    """The inverse of `pack_state`: plain bf16 tensors under their plain names."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    state = {}
    for name, tensor in packed.items():
        if not name.endswith(("_packed", "_scale", "_shape")):
            state[name] = tensor
    for name, width in bits.items():
        shape = torch.Size(packed[f"{name}_shape"].tolist())
        codes = unpack_from_int32(packed[f"{name}_packed"], width, shape)
        state[name] = dequantize(codes, packed[f"{name}_scale"])
    return state
