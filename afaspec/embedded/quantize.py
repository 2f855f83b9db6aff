"""Shipped weights: matrices as int4 or int8 groups in compressed-tensors' packed layout.

The unpacked model *is* the model: what ships, what was evaluated and what serves are the same
values. Format: compressed-tensors `pack-quantized`, symmetric, one bf16 scale per group of columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROUP = 64


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes [out, in] (int8) and scales [out, in / GROUP] (bf16, as they are stored)."""
    top = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / top).clamp_min(1e-8).to(torch.bfloat16)
    ratio = groups / scales.float().unsqueeze(-1)
    return ratio.round().clamp(-top, top).flatten(1).to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The bf16 weight [out, in] that codes and scales stand for."""
    values = codes.unflatten(1, (-1, GROUP)).float() * scales.float().unsqueeze(-1)
    return values.flatten(1).to(torch.bfloat16)


def round_to_grid(weight: Tensor, bits: int) -> Tensor:
    """`weight` [out, in] rounded to what its packed form unpacks to, in its own dtype."""
    return dequantize(*quantize(weight, bits)).to(weight.dtype)


def pack_state(state: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Pack every float matrix; other float tensors become bf16, integer ones stay."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            packed[name] = tensor
        elif tensor.ndim != 2:
            packed[name] = tensor.to(torch.bfloat16)
        else:
            codes, scales = quantize(tensor, bits)
            packed[f"{name}_packed"] = pack_to_int32(codes, bits)
            packed[f"{name}_scale"] = scales
            packed[f"{name}_shape"] = torch.tensor(tensor.shape)
    return packed


def unpack_state(packed: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The inverse of `pack_state`: plain bf16 tensors under their plain names."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    state = {}
    for name, tensor in packed.items():
        if name.endswith("_packed"):
            plain = name.removesuffix("_packed")
            shape = torch.Size(packed[f"{plain}_shape"].tolist())
            codes = unpack_from_int32(tensor, bits, shape)
            state[plain] = dequantize(codes, packed[f"{plain}_scale"])
        elif not name.endswith(("_scale", "_shape")):
            state[name] = tensor
    return state


def quantization_config(bits: int) -> dict[str, Any]:
    """What compressed-tensors reads from a model's config.json."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": GROUP, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear", "Embedding"], "weights": weights}},
        "ignore": [],
    }


def packed_bits(config: dict[str, Any]) -> int:
    """The width that a packed model's config.json states."""
    bits: int = config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
    return bits
