"""A draft model: a small causal language model of its own, which reads nothing of the target."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from drafts.nn.interface import Draft, Reads
from drafts.target.head import scale_and_cap, scaled_and_capped


class LmDraft(Draft):
    """Any transformers causal LM, as `self.lm`.

    Its draft of x[t+j+2] from x[0..t+j+1] is its own next token at row t+j+1, whatever the step.
    So one pass over the sequence gives every step's outputs, as views shifted by a row each.
    """

    reads: ClassVar[Reads] = "nothing"
    steps_alike: ClassVar[bool] = True

    def __init__(self, lm: Any):
        vocabulary = lm.config.vocab_size
        super().__init__(vocabulary, vocabulary)
        self.lm = lm.train()  # the mode that a new module is in

    @property
    def feature_size(self) -> int:
        return 0

    def forward(
        self, features: Tensor, input_ids: Tensor, steps: int, first_row: int = 0
    ) -> list[Tensor]:
        states = self.states(input_ids)
        rows = input_ids.shape[1] - 1 - first_row
        return [
            F.pad(later, (0, 0, 0, rows - later.shape[1]))
            for later in (states[:, first_row + 1 + j :] for j in range(steps))
        ]

    def states(self, input_ids: Tensor) -> Tensor:
        """What the output layer sees, [batch, n, d]: later rows never change earlier ones."""
        output = self.lm.get_decoder()(input_ids=input_ids, use_cache=False)
        return cast(Tensor, output.last_hidden_state)

    def logits(self, output: Tensor, step: int) -> Tensor:
        """The output layer's logits, scaled and capped as the architecture has it."""
        logits = cast(Tensor, self.lm.get_output_embeddings()(output))
        return scaled_and_capped(logits, *scale_and_cap(self.lm.config.get_text_config()))

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        ids = input_ids.unsqueeze(0)
        for j in range(k):
            drafted = self.best(self.states(ids)[:, -1], j)
            ids = F.pad(ids, (0, 1), value=drafted)
        return cast("list[int]", ids[0, -k:].tolist())
