"""Filling a draft module from a checkpoint: stored tensors, shared ones, and the vocabulary map."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from drafts.checkpoint.shared import shared_tensor
from drafts.checkpoint.source import FETCH
from drafts.errors import UserError, first_line
from drafts.target import SHARED, TargetInfo
from drafts.tensors import open_tensors

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from drafts.checkpoint.info import DraftInfo
    from drafts.nn.interface import Draft

D = TypeVar("D", bound="Draft")


def fill(
    draft: D, info: DraftInfo, module_name: Callable[[str], str], target: TargetInfo | None
) -> D:
    """Load `draft`'s weights in float32. What the checkpoint shares comes from the target."""
    stored = {module_name(k): v for k, v in open_tensors(info.folder).load_all().items()}
    d2t = stored.pop("d2t", None)
    wanted = dict(draft.state_dict())
    wanted.pop("d2t")
    for name in SHARED:
        if name in wanted and name not in stored:
            stored[name] = shared_tensor(name, tuple(wanted[name].shape), info, target)
    if lacking := sorted(wanted.keys() - stored.keys()):
        raise UserError(f"lacks {', '.join(lacking[:4])}", where=info.folder, hint=FETCH)
    for name, value in wanted.items():
        if stored[name].shape != value.shape:
            raise UserError(
                f"{name} is {list(stored[name].shape)}, the config says {list(value.shape)}",
                where=info.folder,
                hint=FETCH,
            )
    draft.load_state_dict({name: stored[name].float() for name in wanted}, strict=False)
    draft.set_vocabulary_map(vocabulary_map(d2t, info))
    return draft


def vocabulary_map(d2t: Tensor | None, info: DraftInfo) -> Tensor:
    """d2t [draft_vocab] as int64, checked; zeros for a full vocabulary."""
    import torch

    if info.draft_vocab_size == info.vocab_size:
        return torch.zeros(info.vocab_size, dtype=torch.long)
    if d2t is None:
        raise UserError(
            "has a reduced vocabulary but no d2t tensor that maps it", where=info.folder, hint=FETCH
        )
    ids = torch.arange(info.draft_vocab_size) + d2t.long()
    if d2t.shape != (info.draft_vocab_size,) or ids.min() < 0 or ids.max() >= info.vocab_size:
        raise UserError("d2t points outside the vocabulary", where=info.folder, hint=FETCH)
    if len(ids.unique()) != len(ids):
        raise UserError("d2t maps two draft ids to one token", where=info.folder, hint=FETCH)
    return d2t.long()


def load_causal_lm(folder: Path, dtype: dtype, kind: str) -> tuple[Any, list[str]]:
    """transformers' own model, and the tensors that it lacks or misshapes.

    Raises `UserError` for damaged or foreign models; `kind` says what such a model should be.
    """
    from transformers.utils import logging

    from drafts.target_head import model_class

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
        )
    except Exception as error:  # a library boundary: every kind of damaged or unknown model
        raise UserError(
            f"transformers cannot load this {kind} ({type(error).__name__}: {first_line(error)})",
            where=folder,
            hint="check that transformers knows this architecture and that its files are whole",
        ) from error
    return model, sorted(loaded["missing_keys"]) + [str(k[0]) for k in loaded["mismatched_keys"]]
