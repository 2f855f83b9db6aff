"""Drafts that make one token after another, each step from the state that the last one left."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafts.nn.interface import Draft
from drafts.nn.layers import LayerConfig, Rotation, Steps, rotary

Caches = list[Steps]  # by layer


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

    def __init__(self, config: LayerConfig, vocab_size: int, draft_vocab_size: int):
        super().__init__(vocab_size, draft_vocab_size)
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size)
        self.rotary = rotary(config)

    @abstractmethod
    def start(self, features: Tensor) -> Tensor:
        """The hidden state [..., d] that step 0 takes, from the target's features."""

    @abstractmethod
    def decode(
        self, hidden: Tensor, embeds: Tensor, at: Rotation, caches: Caches, first_row: int
    ) -> tuple[Tensor, Tensor]:
        """Output and the state fed to the next step, of the rows from `first_row` on."""

    def feed(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden state and tokens that a later step takes, given what a chain would take."""
        return state, tokens

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, first_row: int = 0
    ) -> list[Tensor]:
        hidden, outputs = self.start(features[:, :-1]), []
        caches: Caches = [[] for _ in self.layers]
        for j in range(steps):
            tokens = F.pad(input_ids[:, j + 1 :], (0, j))[:, -hidden.shape[1] :]
            output, hidden = self._step(hidden, tokens, j, caches, first_row)
            outputs.append(output)
        return outputs

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        hidden, drafted = self.start(features).unsqueeze(0), []
        caches: Caches = [[] for _ in self.layers]
        tokens = input_ids[1:].unsqueeze(0)
        for j in range(k):
            output, hidden = self._step(hidden, tokens, j, caches, first_row=len(features) - 1)
            drafted.append(self.best(output[:, -1], j))
            tokens = torch.tensor([[drafted[-1]]], device=input_ids.device)
        return drafted

    def _step(
        self, hidden: Tensor, tokens: Tensor, j: int, caches: Caches, first_row: int
    ) -> tuple[Tensor, Tensor]:
        """Step j. hidden and tokens cover the last rows of the sequence: all of them at step 0."""
        if j > 0:
            hidden, tokens = self.feed(hidden, tokens)
        rows = caches[0][0][0].shape[2] if j > 0 else hidden.shape[1]
        positions = torch.arange(rows - hidden.shape[1], rows, device=hidden.device) + j
        at = self.rotary(hidden, positions.unsqueeze(0))
        return self.decode(hidden, self.embed_tokens(tokens), at, caches, first_row)


def rows_to_draft(caches: Caches, first_row: int) -> list[int]:
    """From which row on each layer computes outputs.

    At step 0 every layer but the last does so for all rows, as keys of the layers after it.
    """
    earlier = first_row if caches[0] else 0
    return [earlier] * (len(caches) - 1) + [first_row]
