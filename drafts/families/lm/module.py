"""A draft model: a small causal language model of its own, which reads nothing of the target."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from drafts.nn.interface import Draft, Reads
from drafts.nn.packing import Packing
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
        self, features: Tensor, input_ids: Tensor, steps: int, packing: Packing
    ) -> list[Tensor]:
        states = self.states(input_ids, packing)
        return [packing.after(states, packing.rows, j + 1) for j in range(steps)]

    def states(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """What the output layer sees, [n, d]: later rows never change earlier ones.

        The model gets the sequences side by side, padded, for it is not ours to pack them.
        """
        lengths = packing.lengths
        ids = pad_sequence(input_ids[: len(packing)].split(lengths), batch_first=True)
        output = self.step_of(self._decoder, ids)
        pairs = zip(output.last_hidden_state, lengths, strict=True)
        return torch.cat([states[:length] for states, length in pairs])

    def _decoder(self, ids: Tensor) -> Any:
        return self.lm.get_decoder()(input_ids=ids, use_cache=False)

    def logits(self, output: Tensor, step: int) -> Tensor:
        """The output layer's logits, scaled and capped as the architecture has it."""
        logits = cast(Tensor, self.lm.get_output_embeddings()(output))
        return scaled_and_capped(logits, *scale_and_cap(self.lm.config.get_text_config()))

    @torch.no_grad()
    def propose(self, features: Tensor, input_ids: Tensor, k: int) -> list[int]:
        ids = input_ids
        for j in range(k):
            drafted = self.best(self.states(ids, Packing.of([len(ids)]))[-1:], j)
            ids = F.pad(ids, (0, 1), value=drafted)
        return cast("list[int]", ids[-k:].tolist())
