"""The training objective: k teacher-forced draft steps against the target's distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from afaspec.train.losses import DraftedRows, fused_loss
from drafts.nn.interface import Draft
from drafts.nn.packing import Packing
from drafts.target.head import TargetHead

# Made at a time for draft and target each: on a CPU as many as a cache holds some of, on a GPU as
# many as keep it busy.
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}


@dataclass
class Batch:
    """Sequences of `lengths` one after another: ids and mask [n], hidden [n, layers*d], final
    [n, d]."""

    input_ids: Tensor
    loss_mask: Tensor
    hidden: Tensor
    final: Tensor
    lengths: list[int]

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.input_ids),
            change(self.loss_mask),
            change(self.hidden),
            change(self.final),
            self.lengths,
        )


def collate(sequences: Sequence[Any]) -> Batch:
    """Stored sequences as one batch."""
    return Batch(
        input_ids=torch.cat([s.input_ids.long() for s in sequences]),
        loss_mask=torch.cat([s.loss_mask.bool() for s in sequences]),
        hidden=torch.cat([s.hidden for s in sequences]),
        final=torch.cat([s.final for s in sequences]),
        lengths=[len(s.input_ids) for s in sequences],
    )


class DraftObjective(nn.Module):
    """Loss of a draft on a batch; the module that is trained (and wrapped for several devices).

    Only rows count whose token is a response token that the draft can say at all (greedy decoding
    never accepts the others). Step j weighs `step_decay ** j`.
    """

    def __init__(
        self,
        draft: Draft,
        target_head: TargetHead,
        *,
        loss: str,
        draft_steps: int,
        step_decay: float,
        chunk: int | None,
        compiled: bool,
    ):
        super().__init__()
        self.draft = draft
        self.loss, self.chunk, self.compiled = loss, chunk, compiled
        steps = 1 if draft.steps_alike else draft_steps
        self.weights = [step_decay**j for j in range(steps)]
        self.target_head = target_head.rows(draft.target_ids())

    def labels(self, input_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """For each draft step the tokens that have a loss, by number: step j's x[t] is drafted from
        row t - j - 2, which must be of the same sequence."""
        counted = loss_mask & (self.draft.t2d[input_ids] >= 0)
        positions = Packing.of(lengths, input_ids.new_empty(0)).positions
        return [(counted & (positions >= j + 2)).nonzero()[:, 0] for j in range(len(self.weights))]

    def tokens(self, input_ids: Tensor, loss_mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """How many tokens each draft step's loss is taken over; int64 [steps]."""
        return torch.tensor([len(one) for one in self.labels(input_ids, loss_mask, lengths)])

    def forward(self, batch: Batch, tokens: Tensor | None = None) -> Tensor:
        """The mean loss per token over the draft steps, weighted; a float32 scalar.

        `tokens` [steps] are those to take the mean over, the batch's own by default. Losses of the
        parts of a larger batch, with its `tokens`, add up to the loss of the whole.
        """
        labels = self.labels(batch.input_ids, batch.loss_mask, batch.lengths)
        counts = [len(one) for one in labels] if tokens is None else tokens.tolist()
        drafting = torch.zeros_like(batch.loss_mask)
        for j, label in enumerate(labels):
            drafting[label - j - 2] = True
        packing = Packing.of(batch.lengths, drafting.nonzero()[:, 0])
        place = drafting.cumsum(0) - 1  # of each row among those that are drafted from
        features = self.draft.features(batch.hidden, batch.final)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.draft.dtype)
        outputs = self.draft(features, batch.input_ids, len(self.weights), packing)
        steps = [
            DraftedRows(
                output[place[label - j - 2]],
                torch.searchsorted(labels[0], label),  # step 0 has the labels of all steps
                partial(self.draft.logits, step=j),
                weight / max(count, 1) / sum(self.weights),
            )
            for j, (label, output, weight, count) in enumerate(
                zip(labels, outputs, self.weights, counts, strict=True)
            )
        ]
        return fused_loss(
            self.loss,
            self.target_head,
            batch.final[labels[0] - 1],  # final[t - 1] predicts x[t]
            steps,
            list(self.draft.parameters()),
            chunk=self.chunk or rows_at_once(len(self.draft.d2t), features.device),
            compiled=self.compiled,
        )


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are made at a time, where nothing is asked for."""
    return max(64, LOGITS.get(device.type, LOGITS["cpu"]) // vocabulary)
