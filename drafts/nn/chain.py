"""Drafts that make one token after another, each step from the state that the last one left."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drafts.nn.interface import Draft
from drafts.nn.layers import KeysValues, Rotation, Steps, rotation
from drafts.nn.packing import Packing

Caches = list[list[KeysValues]]  # by layer and draft step


class ChainDraft(Draft):
    """EAGLE and its kin: decoder layers that go over their own output, one step a token.

    In the words of `drafts.nn.interface`:

    - step 0 at row t takes `start(f[t])` and the embedding of x[t+1] at position t;
    - step j feeds the row's own state back in, with the embedding of x[t+j+1], at position t+j;
    - step j attends to the step-0 keys of rows 0..t and to the row's own keys of steps 1..j.

    So all rows of a sequence can be drafted at once (training-time test), each exactly as the
    server would after accepting everything up to x[t+1].
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    lm_head: nn.Linear

    def __init__(self, rotary: nn.Module, hidden_size: int, vocab_size: int, draft_vocab_size: int):
        super().__init__(vocab_size, draft_vocab_size)
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.rotary = rotary

    @abstractmethod
    def start(self, features: Tensor) -> Tensor:
        """The hidden state [..., d] that step 0 takes, from the target's features."""

    @abstractmethod
    def decode(
        self,
        hidden: Tensor,
        embeds: Tensor,
        at: Rotation,
        caches: Sequence[Steps],
        packing: Packing,
    ) -> tuple[Tensor, Tensor, list[KeysValues]]:
        """Output and the state fed to the next step, [m, d] of the rows of `packing`, and what
        each layer adds to `caches`, its keys and values of earlier steps.

        hidden, embeds: [n, d] at step 0, of all rows, which give keys; later of the m.
        """

    def feed(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state and tokens that a later step takes, given what a chain would take."""
        return state, tokens

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        hidden, rows, outputs = self.start(features), packing.whole.rows, []
        caches: Caches = [[] for _ in self.layers]
        for j in range(steps):
            tokens = packing.after(input_ids, rows, j + 1)
            output, hidden = self._step(hidden, tokens, j, caches, packing)
            outputs.append(output)
            rows = packing.rows
        return outputs

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        hidden, drafted = self.start(features), []
        packing = Packing.last_of(features)
        caches: Caches = [[] for _ in self.layers]
        tokens = input_ids[1:]
        for j in range(k):
            output, hidden = self._step(hidden, tokens, j, caches, packing)
            drafted.append(self.best(output, j))
            tokens = torch.tensor([drafted[-1]], device=input_ids.device)
        return drafted

    def _step(
        self, hidden: Tensor, tokens: Tensor, j: int, caches: Caches, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """Step j. hidden and tokens are those of all rows at step 0, later of those drafted."""
        if j > 0:
            hidden, tokens = self.feed(hidden, tokens)
        positions = packing.positions if j == 0 else packing.positions[packing.rows]
        at = rotation(self.rotary, hidden, positions + j)
        embeds, earlier = self.embed_tokens(tokens), [list(steps) for steps in caches]
        output, state, made = self.step_of(self.decode, hidden, embeds, at, earlier, packing)
        for steps, keys_values in zip(caches, made, strict=True):
            steps.append(keys_values)
        return output, state


def layer_packings(caches: Sequence[Steps], packing: Packing) -> list[Packing]:
    """Which rows each layer computes outputs of.

    At step 0 every layer but the last does so for all rows, as keys of the layers after it.
    """
    earlier = packing if caches[0] else packing.whole
    return [earlier] * (len(caches) - 1) + [packing]
