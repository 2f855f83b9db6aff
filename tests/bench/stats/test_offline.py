"""Offline acceptance: walking blocks equals a simulated server, token by token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.stats import offline
from bench.stats.offline import (
    match_matrix,
    offline_acceptance,
    offline_agreement,
    response_spans,
    walk_blocks,
)
from drafts.errors import NotFiniteError
from drafts.nn.interface import Draft
from tests.opened import load_draft
from tests.packed import alone

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
def test_offline_equals_a_server_that_goes_token_by_token(
    draft: Draft, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "TOKENS", 2 * (PROMPT + RESPONSE))  # two sequences at a time
    stored = sequences(draft, count=5, agreement=0.7)
    measured = offline_acceptance(draft, stored, k, amp=False)
    served = [serve(draft, sequence, k) for sequence in stored]
    assert measured.drafts_per_prompt.tolist() == [drafts for drafts, _ in served]
    assert measured.accepted_per_prompt.tolist() == [accepted for _, accepted in served]
    assert measured.acceptance_length > 1.2  # the case is not an empty one


def test_what_lies_beside_a_sequence_changes_nothing(draft: Draft) -> None:
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


@pytest.mark.parametrize("k", [1, 3])
def test_each_response_of_a_conversation_is_walked_alone(draft: Draft, k: int) -> None:
    """Two answers with a question between: what a server drafts for each, and nothing between."""
    (stored,) = sequences(draft, count=1, agreement=0.7)
    end, again = 18, 24
    mask = stored.loss_mask.clone()
    mask[end:again] = False
    assert list(response_spans(mask)) == [(PROMPT, end), (again, PROMPT + RESPONSE)]
    measured = offline_acceptance(draft, [replace(stored, loss_mask=mask)], k, amp=False)

    def part(start: int, stop: int) -> tuple[int, list[int]]:
        drafts, accepted, known = 0, [0] * k, start + 1
        while known + k <= stop:
            proposal = draft.propose(stored.hidden[: known - 1], stored.input_ids[:known], k)
            count = 0
            while count < k and proposal[count] == int(stored.input_ids[known + count]):
                accepted[count] += 1
                count += 1
            drafts += 1
            known += count + 1
        return drafts, accepted

    (drafts, accepted), (later, also) = part(PROMPT, end), part(again, PROMPT + RESPONSE)
    assert measured.drafts_per_prompt.tolist() == [drafts + later]
    assert measured.accepted_per_prompt.tolist() == [np.add(accepted, also).tolist()]
    whole = offline_acceptance(draft, [stored], k, amp=False)
    assert measured.drafts_per_prompt.tolist() != whole.drafts_per_prompt.tolist()


def test_a_sequence_without_or_all_of_response_is_counted_as_it_is(draft: Draft) -> None:
    (stored,) = sequences(draft, count=1, agreement=0.5)
    none = replace(stored, loss_mask=torch.zeros_like(stored.loss_mask))
    every = replace(stored, loss_mask=torch.ones_like(stored.loss_mask))
    measured = offline_acceptance(draft, [none, every], 3, amp=False)
    assert measured.drafts_per_prompt[0] == 0
    assert measured.drafts_per_prompt[1] > 0


def test_agreement_is_with_what_the_target_makes_likeliest(draft: Draft) -> None:
    """The path is random; the target agrees with the draft at every place but one."""
    stored = sequences(draft, count=1, agreement=0.0)[0]
    row = draft(stored.hidden, stored.input_ids, 1, alone(len(stored.input_ids)))[0]
    said = draft.target_ids()[draft.logits(row, 0).argmax(-1)]
    likeliest = stored.input_ids.clone()
    likeliest[2:] = said[: len(likeliest) - 2]
    likeliest[PROMPT + 3] = (likeliest[PROMPT + 3] + 1) % draft.vocab_size
    agreed = offline_agreement(draft, [stored], [likeliest], 1, amp=False)
    drafts, accepted = int(agreed.drafts_per_prompt[0]), int(agreed.accepted_per_prompt[0, 0])
    assert drafts - accepted == 1
    path = offline_acceptance(draft, [stored], 1, amp=False)
    assert path.accepted_per_prompt[0, 0] < accepted
    same = offline_agreement(draft, [stored], [stored.input_ids], 1, amp=False)
    assert same.accepted_per_prompt.tolist() == path.accepted_per_prompt.tolist()


def test_a_draft_whose_logits_are_not_finite_is_refused(
    draft: Draft, tiny_draft: Path, tiny_target: Path
) -> None:
    stored = sequences(draft, count=2, agreement=0.5)
    broken = load_draft(tiny_draft, tiny_target)
    with torch.no_grad():
        broken.get_parameter("lm_head.weight")[7, 3] = float("nan")
    with pytest.raises(NotFiniteError, match="logits are NaN or infinite"):
        offline_acceptance(broken, stored, 3, amp=False)


def test_logits_are_made_for_some_rows_at_a_time(
    draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sequences(draft, 6, agreement=0.7)
    whole, vocabulary = offline_acceptance(draft, rows, 3), len(draft.d2t)
    monkeypatch.setattr(offline, "LOGITS", 64 * vocabulary)
    made, logits = [], draft.logits

    def recorded(output: Tensor, step: int) -> Tensor:
        made.append(output.shape[:-1].numel())
        return logits(output, step)

    monkeypatch.setattr(draft, "logits", recorded)
    parts = offline_acceptance(draft, rows, 3)
    assert max(made) == 64 < sum(made) // 3
    assert (parts.drafts_per_prompt == whole.drafts_per_prompt).all()
    assert (parts.accepted_per_prompt == whole.accepted_per_prompt).all()
