"""Drafts from scratch: random modules sized after their target, for training a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drafts.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.draft import Draft

INIT_STD = 0.02


@dataclass(frozen=True)
class FreshOptions:
    """What a user may choose of a fresh draft; None takes the target's own or the family's usual.

    kept: the target ids that the draft can say, ascending (None: all); max_k: the tokens that a
    Medusa or parallel draft is made for.
    """

    num_layers: int | None = None
    layer_ids: tuple[int, ...] | None = None
    kept: Tensor | None = None
    max_k: int = 4
    seed: int = 0


def fresh_draft(family: str, target: Path, options: FreshOptions | None = None) -> Draft:
    """A seeded random draft of `family` for `target`; its output layer starts as the target's."""
    import torch

    from drafts.formats import FAMILIES

    if family not in FAMILIES:
        raise UserError(
            f"family {family!r} is unknown", mend=f"choose one of {', '.join(sorted(FAMILIES))}"
        )
    options = options or FreshOptions()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        return FAMILIES[family].fresh(target, options)


def init_linears(draft: Draft) -> None:
    """Small normal weights in every linear layer, zero biases."""
    from torch import nn

    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def take_from_target(draft: Draft, target: Path, kept: Tensor | None) -> None:
    """Map the vocabulary to `kept`, and copy the target's embedding and output rows.

    They go where the draft has `embed_tokens` and `lm_head` of the same shape.
    """
    import torch

    from drafts.target import load_embedding, load_lm_head

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
