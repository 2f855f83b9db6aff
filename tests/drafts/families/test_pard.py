"""PARD drafts: any causal LM with a mask token, which says all its tokens in one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from afaspec.store.read import Sequence
from bench.stats.offline import match_matrix
from drafts.errors import UserError
from drafts.families.pard.module import PardDraft
from drafts.nn.packing import Packing
from drafts.registry import read_draft, save_draft
from tests.drafts.families.test_lm import hf_logits, write_lm
from tests.opened import load_draft, speculative_config
from tests.packed import alone
from tests.tiny.models import VOCAB

MASK = VOCAB - 1
STEPS = 4


def write_pard(folder: Path, name: str = "llama", token: Any = MASK, **changes: Any) -> Path:
    """A random causal LM, whose config names a mask token as AMD's drafts do."""
    write_lm(folder, name, **changes)
    raw = json.loads((folder / "config.json").read_text()) | {"pard_token": token}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(VOCAB - 1, (24,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", ["llama", "qwen3, tied", "granite, scaled", "cohere, scaled", "qwen3_moe", "mistral"]
)
def test_each_row_says_what_transformers_says_after_the_text_and_masks(
    name: str, tmp_path: Path, text: torch.Tensor
) -> None:
    folder = write_pard(tmp_path / "pard", name)
    draft, first = load_draft(folder).eval(), 5
    with torch.no_grad():
        outputs = draft(torch.empty(24, 0), text, STEPS, alone(24, first))
    found = torch.stack([draft.logits(output, j) for j, output in enumerate(outputs)], dim=1)
    for row in (5, 6, 11, 22):
        ids = torch.cat([text[: row + 2], torch.full((STEPS - 1,), MASK)])
        expected = hf_logits(folder, ids.unsqueeze(0))[0, -STEPS:]
        torch.testing.assert_close(found[row - first], expected, rtol=1e-4, atol=1e-4)


def test_a_window_of_the_target_counts_for_masks_too(tmp_path: Path, text: torch.Tensor) -> None:
    """transformers' own sliding window is the reference."""
    draft = load_draft(write_pard(tmp_path / "pard", "mistral")).eval()
    assert isinstance(draft, PardDraft)
    draft.lm.config.sliding_window = 3
    with torch.no_grad():
        outputs = draft(torch.empty(24, 0), text, STEPS, alone(24, 9))
        ids = torch.cat([text[:11], torch.full((STEPS - 1,), MASK)])
        expected = draft.lm(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -STEPS:]
    for j, output in enumerate(outputs):
        torch.testing.assert_close(draft.logits(output[0], j), expected[j], rtol=1e-4, atol=1e-4)
    draft.lm.config.sliding_window = None
    with torch.no_grad():
        wide = draft(torch.empty(24, 0), text, STEPS, alone(24, 9))
    assert not torch.allclose(wide[2], outputs[2], atol=1e-3)


def test_packed_sequences_do_not_see_each_other(tmp_path: Path, text: torch.Tensor) -> None:
    draft = load_draft(write_pard(tmp_path / "pard")).eval()
    lengths = [10, 14]
    rows = torch.tensor([3, 9, 12, 20])  # the last row of the first has nothing after it
    with torch.no_grad():
        both = draft(torch.empty(24, 0), text, STEPS, Packing.of(lengths, rows))
        first = draft(torch.empty(10, 0), text[:10], STEPS, Packing((0, 10), rows[:1]))
        second = draft(torch.empty(14, 0), text[10:], STEPS, Packing((0, 14), rows[2:] - 10))
    for j in range(STEPS):
        torch.testing.assert_close(both[j][:1], first[j], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[j][2:], second[j], rtol=1e-4, atol=1e-4)


def test_rows_at_once_are_what_the_server_drafts(tmp_path: Path, text: torch.Tensor) -> None:
    draft = load_draft(write_pard(tmp_path / "pard")).eval()
    with torch.no_grad():
        outputs = draft(torch.empty(24, 0), text, STEPS, alone(24, 0))
    for row in (0, 7, 22):
        served = draft.propose(torch.empty(row + 1, 0), text[: row + 2], STEPS)
        assert served == [draft.best(outputs[j][row : row + 1], j) for j in range(STEPS)]


def test_offline_acceptance_knows_that_steps_differ(tmp_path: Path, text: torch.Tensor) -> None:
    """A draft model's steps are one another's rows; those of masks are not."""
    draft = load_draft(write_pard(tmp_path / "pard")).eval()
    answer = text.tolist()
    for at in range(8, 24):  # what it says itself, so that something matches
        answer[at] = draft.propose(torch.empty(at - 1, 0), torch.tensor(answer[:at]), 2)[0]
    ids = torch.tensor(answer)
    sequence = Sequence(ids, torch.arange(24) >= 7, torch.empty(24, 0), torch.empty(24, 0), 0)
    (matches,) = match_matrix(draft, [sequence], STEPS, amp=False)
    rows = range(7, 24 - STEPS - 1)
    for row in rows:
        proposal = draft.propose(torch.empty(row + 1, 0), ids[: row + 2], STEPS)
        known = answer[row + 2 : row + 2 + STEPS]
        assert matches[row].tolist() == [p == x for p, x in zip(proposal, known, strict=True)]
    assert matches.any()
    assert not matches.all()


def test_what_is_made_again_in_the_backward_pass_has_the_same_gradients(
    tmp_path: Path, text: torch.Tensor
) -> None:
    draft, found = load_draft(write_pard(tmp_path / "pard")), []
    for draft.gradient_checkpointing in (False, True):
        draft.zero_grad()
        outputs = draft(torch.empty(24, 0), text, STEPS, alone(24, 4))
        sum(draft.logits(output, j).sin().sum() for j, output in enumerate(outputs)).backward()
        found.append({name: p.grad.clone() for name, p in draft.named_parameters()})
    assert all(grad.abs().sum() > 0 for grad in found[0].values())
    torch.testing.assert_close(found[0], found[1])


def test_it_is_read_served_and_written_as_published(tmp_path: Path) -> None:
    folder = write_pard(tmp_path / "pard")
    info = read_draft(folder)
    assert (info.family, info.method, info.reads) == ("pard", "draft_model", "nothing")
    config = speculative_config(folder, 4)
    assert config is not None
    assert (config["method"], config["parallel_drafting"]) == ("draft_model", True)
    (tmp_path / "again").mkdir()
    save_draft(load_draft(folder), "pard", tmp_path / "again", dtype=torch.float32)
    again = read_draft(tmp_path / "again")
    assert (again.family, again.config["pard_token"]) == ("pard", MASK)


def test_a_mask_token_alone_makes_no_pard_draft(tmp_path: Path) -> None:
    """Other models' configs have one too; beside a PARD draft's own name of it, it counts."""
    folder = write_lm(tmp_path / "lm")
    raw = json.loads((folder / "config.json").read_text()) | {"mask_token_id": 7}
    (folder / "config.json").write_text(json.dumps(raw))
    assert read_draft(folder).family == "draft_model"
    (folder / "config.json").write_text(json.dumps(raw | {"pard_token": MASK}))
    draft = load_draft(folder)
    assert isinstance(draft, PardDraft)
    assert draft.mask_token_id == 7


def test_pard_2_is_taken_without_the_targets_states_and_says_so(tmp_path: Path) -> None:
    folder = write_pard(tmp_path / "pard")
    raw = json.loads((folder / "config.json").read_text()) | {"spd_type": "pard2"}
    (folder / "config.json").write_text(json.dumps(raw))
    (warning,) = read_draft(folder).warnings
    assert "target-independent mode" in warning


@pytest.mark.parametrize("token", [VOCAB, -1, "mask", 1.5])
def test_a_mask_token_outside_the_vocabulary_is_refused(tmp_path: Path, token: Any) -> None:
    with pytest.raises(UserError, match=r"pard_token is .*expected a token id below"):
        read_draft(write_pard(tmp_path / "pard", token=token))


def test_an_attention_that_masks_cannot_follow_is_refused(tmp_path: Path) -> None:
    """Gemma 2 caps its scores, which our attention does not."""
    folder = write_pard(tmp_path / "pard", "gemma2, softcap")
    with pytest.raises(UserError, match="cannot draft in parallel with"):
        load_draft(folder)
