"""Filling a draft module from a checkpoint: stored tensors, shared ones, and the vocabulary map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drafts.checkpoint.shared import shared_tensor
from drafts.checkpoint.source import load_tensor, open_source
from drafts.errors import UserError, first_line
from drafts.target.info import TargetInfo

if TYPE_CHECKING:
    from torch import dtype

    from drafts.checkpoint.info import DraftInfo
    from drafts.nn.interface import Draft

D = TypeVar("D", bound="Draft")


def fill(
    draft: D, info: DraftInfo, module_name: Callable[[str], str], target: TargetInfo | None
) -> D:
    """Load `draft`'s weights in float32. What the checkpoint shares comes from the target.

    That all of it is there and fits, `Family.describe` has checked.
    """
    source = open_source(info.folder)
    stored = {module_name(name): name for name in source.headers}
    state = {}
    for name, value in draft.state_dict().items():
        if name in stored:
            state[name] = load_tensor(source, stored[name])
        elif name != "d2t":
            state[name] = shared_tensor(name, tuple(value.shape), info, target)
    d2t = state.pop("d2t", None)
    draft.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    if d2t is not None:
        draft.set_vocabulary_map(d2t.long())
    return draft


def load_causal_lm(
    folder: Path, dtype: dtype, kind: str, device: str = "cpu"
) -> tuple[Any, list[str], list[str]]:
    """transformers' own model, the tensors that it lacks or misshapes, and those without a place.

    On the device "meta" no weights are read. Raises `UserError` for damaged or foreign models;
    `kind` says what such a model should be.
    """
    from transformers.utils import logging

    from drafts.target.head import model_class

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loaded = model_class(folder)[1].from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named with those that are missing
            **({"device_map": device} if device == "meta" else {}),
        )
    except Exception as error:  # a library boundary: every kind of damaged or unknown model
        raise UserError(
            f"transformers cannot load this {kind} ({type(error).__name__}: {first_line(error)})",
            where=folder,
            hint="check that transformers knows this architecture and that its files are whole",
        ) from error
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # transformers' others leave the cap out (Gemma 2)
    wrong = sorted(loaded["missing_keys"]) + sorted(str(k[0]) for k in loaded["mismatched_keys"])
    return model, wrong, sorted(loaded["unexpected_keys"])
