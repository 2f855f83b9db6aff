"""Whose hidden states are wanted, and what gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drafts.files import read_json
from drafts.target.info import TargetInfo
from serving.runtime import require_vllm, vllm_package

ReadWith = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class ToRead:
    """Those of `layer_ids`, of texts of at most `longest` tokens.

    The last two are of vLLM's engine.
    """

    target: TargetInfo
    layer_ids: tuple[int, ...]
    dtype: str
    device: str
    longest: int
    enforce_eager: bool = False
    tensor_parallel: int = 1


def choose_reader(
    wanted: Literal["auto", "transformers", "vllm"], target: TargetInfo, device: str
) -> ReadWith:
    """What gives the hidden states. Of a quantized target on a GPU it is vLLM, so that they are
    those of serving.

    Raises `UserError` for a vLLM that is not installed.
    """
    if wanted == "vllm":
        require_vllm()
    if wanted != "auto":
        return wanted
    quantized = "quantization_config" in read_json(target.folder / "config.json")
    served = quantized and device.startswith("cuda") and vllm_package() is not None
    return "vllm" if served else "transformers"
