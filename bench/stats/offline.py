"""Offline acceptance: what a server would accept at temperature 0, from stored features.

The target's own greedy path is fed to the draft (teacher forcing) and walked block by block as the
server walks it: accept the n leading drafts that equal the path, jump n + 1. Up to the first wrong
draft its inputs are the path itself, so nothing is approximated.

A path that was sampled or given is none that a server would walk. There drafts can be held against
the target's likeliest token at each place of it: teacher-forced agreement, which is not acceptance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bench.records.acceptance import Acceptance
from drafts.errors import NotFiniteError
from drafts.tensors import has_bf16

if TYPE_CHECKING:
    from torch import Tensor

    from drafts.nn.interface import Draft


LOGITS = 1 << 24  # made at a time
TOKENS = 1 << 12  # that go through a draft at a time


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
    draft: Draft, sequences: Iterable[Captured], k: int, *, amp: bool | None = None
) -> Acceptance:
    """Acceptance of `draft` with k speculative tokens on greedy `sequences`, such as a store's.

    Runs where the draft is, in bf16 autocast as `amp` says or, without it, where the processor has
    bf16. Blocks are walked within each response of a sequence; those that would draft beyond its
    end are left out, since what the target would have said there is unknown. Raises
    `NotFiniteError` for a draft without logits.
    """
    return _walk(draft, ((s, s.input_ids) for s in sequences), k, amp=amp)


def offline_agreement(
    draft: Draft,
    sequences: Iterable[Captured],
    likeliest: Iterable[Tensor],
    k: int,
    *,
    amp: bool | None = None,
) -> Acceptance:
    """How often drafts equal the target's likeliest tokens, on sequences of any origin.

    `likeliest` has for each sequence ids [n]: at place t what the target makes likeliest after the
    t tokens before it. Counted by the same walk, and equal to acceptance on greedy sequences.
    """
    return _walk(draft, zip(sequences, likeliest, strict=True), k, amp=amp)


def _walk(
    draft: Draft,
    sequences: Iterable[tuple[Captured, Tensor]],
    k: int,
    *,
    amp: bool | None,
) -> Acceptance:
    from drafts.nn.packing import packs

    was_training = draft.training
    draft.eval()
    drafts: list[int] = []
    accepted: list[list[int]] = []
    for pairs in packs(sequences, lambda pair: len(pair[1]), TOKENS):
        rows, wanted = [row for row, _ in pairs], [ids for _, ids in pairs]
        for row, matches in zip(rows, match_matrix(draft, rows, k, wanted, amp=amp), strict=True):
            walks = [
                walk_blocks(matches[: max(end - k - 1, 0)], first_row=max(start - 1, 0))
                for start, end in response_spans(row.loss_mask)
            ]
            drafts.append(sum(count for count, _ in walks))
            accepted.append(np.sum([[0] * k, *(hits for _, hits in walks)], axis=0).tolist())
    draft.train(was_training)
    return Acceptance(
        np.array(drafts, dtype=np.int64), np.array(accepted, dtype=np.int64).reshape(-1, k)
    )


def response_spans(loss_mask: Tensor) -> Iterator[tuple[int, int]]:
    """First place and end of each run of response tokens in a mask [n]: one for each turn."""
    padded = np.concatenate([[0], loss_mask.cpu().numpy().astype(np.int8), [0]])
    edges = np.diff(padded).nonzero()[0].tolist()
    return zip(edges[::2], edges[1::2], strict=True)


def match_matrix(
    draft: Draft,
    rows: list[Captured],
    k: int,
    wanted: list[Tensor] | None = None,
    *,
    amp: bool | None = None,
) -> list[np.ndarray]:
    """For each sequence [n - k - 1, k]: is the j-th draft after row t the wanted token?

    `wanted` are ids [n] of each sequence, by default the sequence itself. Rows before the first
    response, from which no server drafts, are False.
    """
    import torch

    from drafts.nn.packing import Packing

    device = draft.device
    amp = has_bf16(device) if amp is None else amp
    lengths, drafted = [len(r.input_ids) for r in rows], [_drafted_rows(r, k) for r in rows]
    packing = Packing.within(lengths, drafted).to(device)
    ids = torch.cat([r.input_ids.long() for r in rows]).to(device)
    path = ids if wanted is None else torch.cat(wanted).to(device)
    features = torch.cat([draft.features(r.hidden, r.final) for r in rows]).to(device)
    if not amp:
        features = features.to(draft.dtype)
    target_ids, hits = draft.target_ids(), []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for j, outputs in enumerate(draft(features, ids, k, packing)):
            best = target_ids[_likeliest(draft, outputs, j)]
            hits.append(best == packing.after(path, packing.rows, j + 2))
    results = []
    matches = torch.stack(hits, dim=1).cpu().split([len(own) for own in drafted])
    for length, own, hit in zip(lengths, drafted, matches, strict=True):
        result = np.zeros((max(length - k - 1, 0), k), dtype=bool)
        result[own.numpy()] = hit.numpy()
        results.append(result)
    return results


def _drafted_rows(sequence: Captured, k: int) -> Tensor:
    """The rows from which a server may draft k tokens that are all of one response."""
    import torch

    mask = torch.zeros(len(sequence.input_ids), dtype=torch.bool)
    for start, end in response_spans(sequence.loss_mask):
        mask[max(start - 1, 0) : max(end - k - 1, 0)] = True
    return mask.nonzero()[:, 0]


def _likeliest(draft: Draft, outputs: Tensor, step: int) -> Tensor:
    """Of outputs [m, d] the likeliest draft tokens [m]; logits are made for some rows at a time."""
    import torch

    best = [outputs.new_empty(0, dtype=torch.long)]
    for part in outputs.split(max(64, LOGITS // len(draft.d2t))):
        most = draft.logits(part, step).max(-1)  # NaN counts as largest
        if not most.values.isfinite().all():
            raise NotFiniteError(
                "the draft's logits are NaN or infinite",
                hint="look for such values in the draft's weights and in the store's hidden states",
            )
        best.append(most.indices)
    return torch.cat(best)


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
