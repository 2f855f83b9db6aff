"""The training objective: k teacher-forced draft steps against the target's distribution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from afaspec.train.losses import DraftedRows, fused_loss
from drafts.nn.interface import Draft
from drafts.target.head import TargetHead

# Made at a time for draft and target each: on a CPU as many as a cache holds some of, on a GPU as
# many as keep it busy.
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}


@dataclass
class Batch:
    """Right-padded: ids and mask [batch, n], hidden [batch, n, layers*d], final [batch, n, d]."""

    input_ids: Tensor
    loss_mask: Tensor
    hidden: Tensor
    final: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(t.to(device) for t in vars(self).values()))


def collate(sequences: list[Any]) -> Batch:
    """Pad stored sequences to one batch."""
    return Batch(
        input_ids=pad_sequence([s.input_ids.long() for s in sequences], batch_first=True),
        loss_mask=pad_sequence([s.loss_mask.bool() for s in sequences], batch_first=True),
        hidden=pad_sequence([s.hidden for s in sequences], batch_first=True),
        final=pad_sequence([s.final for s in sequences], batch_first=True),
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

    def counted(self, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """Which tokens x[:, 1:] have a loss; bool [batch, n - 1]."""
        return loss_mask[:, 1:] & (self.draft.t2d[input_ids[:, 1:]] >= 0)

    def tokens(self, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
        """How many tokens each draft step's loss is taken over; int64 [steps]."""
        counts = self.counted(input_ids, loss_mask)
        return torch.stack([counts[:, j + 1 :].sum() for j in range(len(self.weights))])

    def forward(self, batch: Batch, tokens: Tensor | None = None) -> Tensor:
        """The mean loss per token over the draft steps, weighted; a float32 scalar.

        `tokens` [steps] are those to take the mean over, the batch's own by default. Losses of the
        parts of a larger batch, with its `tokens`, add up to the loss of the whole.
        """
        counts = self.counted(batch.input_ids, batch.loss_mask)
        if tokens is None:
            tokens = self.tokens(batch.input_ids, batch.loss_mask)
        means = tokens.clamp(min=1).tolist()
        first = max(int(counts.any(dim=0).to(torch.uint8).argmax()) - len(self.weights), 0)
        features = self.draft.features(batch.hidden, batch.final)
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.draft.dtype)
        outputs = self.draft(features, batch.input_ids, len(self.weights), first)
        row, position = counts.nonzero(as_tuple=True)  # final[row, position] predicts the label
        steps = []
        for j, (weight, normed) in enumerate(zip(self.weights, outputs, strict=True)):
            inside = (position > j).nonzero()[:, 0]
            steps.append(
                DraftedRows(
                    normed[row[inside], position[inside] - j - 1 - first],
                    inside,
                    partial(self.draft.logits, step=j),
                    weight / means[j] / sum(self.weights),
                )
            )
        return fused_loss(
            self.loss,
            self.target_head,
            batch.final[row, position],
            steps,
            list(self.draft.parameters()),
            chunk=self.chunk or rows_at_once(len(self.draft.d2t), features.device),
            compiled=self.compiled,
        )


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """How many rows of logits are made at a time, where nothing is asked for."""
    return max(64, LOGITS.get(device.type, LOGITS["cpu"]) // vocabulary)
