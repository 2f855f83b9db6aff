"""Offline acceptance: walking blocks equals a simulated server, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.stats.offline import match_matrix, offline_acceptance, walk_blocks
from drafts.nn.interface import Draft
from tests.opened import load_draft

PROMPT, RESPONSE = 6, 30


@dataclass
class Stored:
    input_ids: Tensor
    loss_mask: Tensor
    hidden: Tensor
    final: Tensor


@pytest.fixture(scope="module")
def draft(tiny_draft: Path, tiny_target: Path) -> Draft:
    return load_draft(tiny_draft, tiny_target).eval()


def sequences(draft: Draft, count: int, agreement: float) -> list[Stored]:
    """Random features, and a path that often follows what the draft proposes."""
    generator = torch.Generator().manual_seed(3)
    length = PROMPT + RESPONSE
    stored = []
    for _ in range(count):
        hidden = torch.randn(length, draft.feature_size, generator=generator)
        ids = torch.randint(draft.vocab_size, (length,), generator=generator)
        for t in range(PROMPT, length - 1):
            if torch.rand((), generator=generator) < agreement:
                ids[t + 1] = draft.propose(hidden[:t], ids[: t + 1], 1)[0]
        mask = torch.arange(length) >= PROMPT
        stored.append(Stored(ids, mask, hidden, hidden[:, :1]))
    return stored


def serve(draft: Draft, sequence: Stored, k: int) -> tuple[int, list[int]]:
    """What a server does: propose after the known tokens, accept while right, one bonus token."""
    path, drafts, accepted = sequence.input_ids, 0, [0] * k
    known = PROMPT + 1
    while known + k <= len(path):
        proposal = draft.propose(sequence.hidden[: known - 1], path[:known], k)
        count = 0
        while count < k and proposal[count] == int(path[known + count]):
            accepted[count] += 1
            count += 1
        drafts += 1
        known += count + 1
    return drafts, accepted


@pytest.mark.parametrize("k", [1, 3, 5])
def test_offline_equals_a_server_that_goes_token_by_token(draft: Draft, k: int) -> None:
    stored = sequences(draft, count=5, agreement=0.7)
    measured = offline_acceptance(draft, stored, k, batch=2, amp=False)
    served = [serve(draft, sequence, k) for sequence in stored]
    assert measured.drafts_per_prompt.tolist() == [drafts for drafts, _ in served]
    assert measured.accepted_per_prompt.tolist() == [accepted for _, accepted in served]
    assert measured.acceptance_length > 1.2  # the case is not an empty one


def test_padding_changes_nothing(draft: Draft) -> None:
    short, long = sequences(draft, count=2, agreement=0.5)
    short = Stored(short.input_ids[:20], short.loss_mask[:20], short.hidden[:20], short.final[:20])
    alone = match_matrix(draft, [short], 3, amp=False)[0]
    together = match_matrix(draft, [short, long], 3, amp=False)[0]
    assert np.array_equal(alone, together)


def test_walking_jumps_over_accepted_tokens() -> None:
    yes, no = True, False
    matches = np.array([[yes, no], [yes, yes], [yes, yes], [no, yes], [yes, yes], [no, no]])
    # row 0 accepts 1 and jumps to 2; row 2 accepts 2 and jumps to 5; row 5 accepts none
    assert walk_blocks(matches, first_row=0) == (3, [2, 1])
    assert walk_blocks(matches, first_row=6) == (0, [0, 0])


def test_a_sequence_too_short_to_draft_counts_nothing(draft: Draft) -> None:
    (stored,) = sequences(draft, count=1, agreement=0.5)
    tiny = Stored(stored.input_ids[:8], stored.loss_mask[:8], stored.hidden[:8], stored.final[:8])
    measured = offline_acceptance(draft, [tiny], 3, amp=False)
    assert measured.drafts_per_prompt.tolist() == [0]
