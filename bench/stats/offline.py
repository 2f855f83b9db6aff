"""Offline acceptance: what a server would accept at temperature 0, from stored features.

The target's own greedy path is fed to the draft (teacher forcing) and walked block by block as the
server walks it: accept the n leading drafts that equal the path, jump n + 1. Up to the first wrong
draft its inputs are the path itself, so nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bench.records.acceptance import Acceptance
from drafts.tensors import has_bf16

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft


class Captured(Protocol):
    """One sequence of a feature store: ids [n], mask [n], hidden [n, layers*d], final [n, d]."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def loss_mask(self) -> Tensor: ...
    @property
    def hidden(self) -> Tensor: ...
    @property
    def final(self) -> Tensor: ...


def offline_acceptance(
    draft: Draft, sequences: Iterable[Captured], k: int, *, batch: int = 8, amp: bool | None = None
) -> Acceptance:
    """Acceptance of `draft` with k speculative tokens on greedy `sequences`, such as a store's.

    Runs where the draft is, in bf16 autocast as `amp` says or, without it, where the processor has
    bf16. Blocks that would draft beyond a sequence's end are left out, since what the target would
    have said there is unknown.
    """
    was_training = draft.training
    draft.eval()
    drafts: list[int] = []
    accepted: list[list[int]] = []
    waiting = iter(sequences)
    while rows := list(islice(waiting, batch)):
        for sequence, matches in zip(rows, match_matrix(draft, rows, k, amp=amp), strict=True):
            prompt = int(sequence.loss_mask.nonzero()[0])
            count, per_position = walk_blocks(matches, first_row=prompt - 1)
            drafts.append(count)
            accepted.append(per_position)
    draft.train(was_training)
    return Acceptance(
        np.array(drafts, dtype=np.int64), np.array(accepted, dtype=np.int64).reshape(-1, k)
    )


def match_matrix(
    draft: Draft, rows: list[Captured], k: int, *, amp: bool | None = None
) -> list[np.ndarray]:
    """For each sequence [n - k - 1, k]: does the j-th draft after row t equal the path?

    Rows of the prompts, from which no server drafts, are False.
    """
    import torch
    from torch.nn.functional import pad
    from torch.nn.utils.rnn import pad_sequence

    device = draft.device
    amp = has_bf16(device) if amp is None else amp
    ids = pad_sequence([r.input_ids.long() for r in rows], batch_first=True).to(device)
    picked = [draft.features(r.hidden, r.final) for r in rows]
    features = pad_sequence(picked, batch_first=True).to(device)
    if not amp:
        features = features.to(draft.dtype)
    target_ids = draft.target_ids()
    first = max(min(int(r.loss_mask.nonzero()[0]) for r in rows) - 1, 0)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        hits = []
        for j, normed in enumerate(draft(features, ids, k, first)):
            drafted = target_ids[draft.logits(normed, j).argmax(-1)]
            known = ids[:, j + 2 + first :]
            hits.append(pad(drafted[:, : known.shape[1]] == known, (first, 0)))
    results = []
    for i, row in enumerate(rows):
        length = max(len(row.input_ids) - k - 1, 0)
        results.append(
            torch.stack([hit[i, :length] for hit in hits], dim=1).cpu().numpy()
            if length
            else np.zeros((0, k), dtype=bool)
        )
    return results


def walk_blocks(matches: np.ndarray, first_row: int) -> tuple[int, list[int]]:
    """Walk the rows of a match matrix [rows, k] as the server would, from `first_row`.

    Returns the number of drafts and, per position, how many were accepted.
    """
    rows, k = matches.shape
    count, per_position, row = 0, np.zeros(k, dtype=int), first_row
    while row < rows:
        run = np.logical_and.accumulate(matches[row])
        per_position += run
        count += 1
        row += int(run.sum()) + 1
    return count, per_position.tolist()
