"""What a draft stores, and what it takes from its target: embedding and output matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drafts.errors import UserError
from drafts.target.info import TargetInfo
from drafts.target.weights import load_embedding

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.checkpoint.info import DraftInfo
    from drafts.nn.interface import Draft


def stored_state(draft: Draft, dtype: Any) -> dict[str, Tensor]:
    """All of the draft's tensors, the floats in `dtype`; d2t only where it maps anything."""
    state = {n: t.to(dtype).contiguous() for n, t in draft.state_dict().items() if n != "d2t"}
    if len(draft.d2t) != draft.vocab_size:
        state["d2t"] = draft.d2t.contiguous()
    return state


def take_from_target(draft: Draft, target: TargetInfo, kept: Tensor | None) -> None:
    """Map the vocabulary to `kept`, and copy the target's embedding and output rows.

    They go where the draft has `embed_tokens` and `lm_head` of the same shape.
    """
    import torch

    from drafts.target.head import load_lm_head

    parameters = dict(draft.named_parameters())
    head = load_lm_head(target)
    sources = {
        "embed_tokens.weight": load_embedding(target),
        "lm_head.weight": head if kept is None else head[kept],
    }
    with torch.no_grad():
        for name, tensor in sources.items():
            if name in parameters and parameters[name].shape == tensor.shape:
                parameters[name].copy_(tensor.float())
    if kept is not None:
        draft.set_vocabulary_map(kept - torch.arange(len(kept)))


def shared_tensor(
    name: str, shape: tuple[int, ...], info: DraftInfo, target: TargetInfo | None
) -> Tensor:
    """The target's embedding or output matrix, for a draft that has none of its own."""
    if target is None:
        raise UserError(
            f"has no {name}, so it shares the target's",
            where=info.folder,
            hint="give the target's folder as well",
        )
    tensor = from_target(name, target)
    if tuple(tensor.shape) != shape:
        what = "embedding" if name.startswith("embed") else "lm_head"
        raise UserError(
            f"shares the target's {what}, which is {list(tensor.shape)}, but needs {list(shape)}",
            where=info.folder,
            hint="use the draft with the target it was trained for",
        )
    return tensor


def from_target(name: str, target: TargetInfo) -> Tensor:
    """The target's own tensor [vocab, hidden] that is called `name` in drafts."""
    from drafts.target.head import load_lm_head

    return {"embed_tokens.weight": load_embedding, "lm_head.weight": load_lm_head}[name](target)
