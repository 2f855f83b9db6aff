"""A target's final norm alone: from the states after its last layer to those before its head."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from drafts.errors import UserError, first_line
from drafts.target.head import own_class
from drafts.target.info import TargetInfo
from drafts.target.weights import parts
from drafts.tensors import open_tensors

# Of Llama and most others; Phi and GPT-NeoX; Falcon and GPT-2.
NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
STORED = re.compile(rf"(?:.*\.)?(?:{'|'.join(NAMES)})\.(weight|bias)")


def load_final_norm(target: TargetInfo, dtype: torch.dtype) -> nn.Module:
    """transformers' own norm after the last layer, with the target's weights, on the CPU.

    Raises `UserError` for a target that does anything else between its last layer and its head, or
    stores its norm under names that afaspec does not know.
    """
    own = own_class(target)
    decoder = own.model.get_decoder()
    name = next((name for name in NAMES if hasattr(decoder, name)), None)
    if name is None or not _comes_last(decoder, getattr(decoder, name)):
        raise UserError(
            f"{own.name} does not show where its final norm is",
            where=target.folder / "config.json",
            hint="let transformers give the hidden states: no --states-with vllm",
        )
    norm: nn.Module = getattr(decoder, name).to_empty(device="cpu")
    tensors = open_tensors(target.folder)
    stored = {part: name for name, part in parts(tensors, STORED).items()}
    wanted = norm.state_dict()
    shapes = {part: tensors.headers[name].shape for part, name in stored.items()}
    if shapes != {part: tuple(tensor.shape) for part, tensor in wanted.items()}:
        raise UserError(
            f"its final norm should have {_sizes(wanted)}; stored is {shapes or 'none'}",
            where=target.folder,
            hint="let transformers give the hidden states: no --states-with vllm",
        )
    norm.load_state_dict({part: tensors.load(name) for part, name in stored.items()})
    return norm.to(dtype).eval()


def _comes_last(decoder: nn.Module, norm: nn.Module) -> bool:
    """Whether the decoder returns what the norm makes, tried without layers and without values."""
    made: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _module, _args, output: made.append(output))
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    try:
        tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
        mask = torch.zeros(1, 1, 2, 2, device="meta")  # a mask that is none asks for values
        last = decoder(input_ids=tokens, attention_mask=mask, use_cache=False)[0]
    except Exception as error:  # the class's own code, called in a way that it may not expect
        raise UserError(
            f"{type(decoder).__name__} does not run without layers "
            f"({type(error).__name__}: {first_line(error)})",
            hint="let transformers give the hidden states: no --states-with vllm",
        ) from error
    finally:
        decoder.layers = layers
        handle.remove()
    return len(made) == 1 and last is made[0]


def _sizes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {part: tuple(tensor.shape) for part, tensor in tensors.items()}
