"""PARD: a small causal LM that says all its tokens in one forward pass (arXiv 2504.18583).

Behind the last known token stand mask tokens, one for each further token, at the positions that
follow. Attention is causal throughout: a mask sees the text and the masks before it, and says what
comes after its own place. The forward is what vLLM computes with `parallel_drafting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from drafts.families.lm.module import LmDraft
from drafts.nn.attention import Sight, attend
from drafts.nn.packing import Packing
from drafts.nn.transformers_attention import ours

# Of four dimensions, so that transformers makes no mask of its own, which would be quadratic.
NO_MASK = torch.zeros(1, 1, 1, 1)


@dataclass(frozen=True)
class Blocks:
    """What one forward holds: the sequences of `known`, all rows, then `masks` slots for each row
    of `anchors`, the rows whose tokens the masks follow."""

    known: Packing
    anchors: Packing
    masks: int

    def position_ids(self) -> Tensor:
        """The places of all tokens and masks in their sequences, [n + m * masks]."""
        places = self.known.positions
        after = torch.arange(1, self.masks + 1, device=places.device)
        return torch.cat([places, (places[self.anchors.rows].unsqueeze(1) + after).flatten()])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """A `drafts.nn.transformers_attention.Attend` over the n tokens and then the masks."""
        n = len(self.known)
        keys, values = k[:, :n], v[:, :n]
        none = keys.new_empty(*keys.shape[:2], 0, keys.shape[2])
        sight = Sight(self.known, window)
        mixed = attend(q[:, :n].unsqueeze(2), keys, values, none, none, sight).squeeze(2)
        if self.masks == 0:
            return mixed
        slot = torch.arange(self.masks, device=q.device)
        apart = slot.unsqueeze(1) - slot
        own = (apart >= 0) if window is None else (apart >= 0) & (apart < window)
        sight = Sight(self.anchors, window, offset=1, own=own)
        slots = (len(self.anchors.rows), self.masks)
        q, k, v = (t[:, n:].unflatten(1, slots) for t in (q, k, v))
        later = attend(q, keys, values, k, v, sight).flatten(1, 2)
        return torch.cat([mixed, later], dim=1)


class PardDraft(LmDraft):
    """Any transformers causal LM, as `self.lm`, and the token that stands for those to come.

    `forward` needs an architecture whose attention asks transformers for its function, and is plain
    causal attention, with a sliding window or without.
    """

    steps_alike: ClassVar[bool] = False

    def __init__(self, lm: Any, mask_token_id: int):
        super().__init__(lm)
        self.mask_token_id = mask_token_id

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        n = len(packing)
        last = torch.tensor(packing.starts[1:], device=packing.device) - 1
        ends = last.repeat_interleave(
            torch.tensor(packing.lengths, device=packing.device), output_size=n
        )
        rows = torch.minimum(packing.rows + 1, ends[packing.rows])
        blocks = Blocks(packing.whole, Packing(packing.starts, rows), steps - 1)
        ids = F.pad(input_ids[:n], (0, len(rows) * blocks.masks), value=self.mask_token_id)
        states = self.step_of(self._blocks, ids, blocks)
        later = states[n:].reshape(len(rows), blocks.masks, states.shape[1])
        return [states[rows], *later.unbind(1)]

    def _blocks(self, ids: Tensor, blocks: Blocks) -> Tensor:
        """What the output layer sees of all tokens and masks, [n + m * masks, d]."""
        decoder = self.lm.get_decoder()
        with ours(decoder.config):
            output = decoder(
                input_ids=ids.unsqueeze(0),
                position_ids=blocks.position_ids().unsqueeze(0),
                attention_mask=NO_MASK.to(ids.device),
                use_cache=False,
                attend=blocks.attend,
            )
        return cast(Tensor, output.last_hidden_state[0])

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        ids = F.pad(input_ids, (0, k - 1), value=self.mask_token_id)
        states = self.states(ids, Packing.of([len(ids)]))[-k:]
        return [self.best(states[j : j + 1], j) for j in range(k)]
