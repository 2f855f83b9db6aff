"""Steps from acceptance: against simulation, by hand, and at other k."""

from __future__ import annotations

import numpy as np
import pytest

from bench.records.acceptance import Acceptance
from bench.sweep.steps import (
    acceptance_length,
    at_k,
    expected_steps,
    from_per_position,
    per_prompt,
    with_length,
)
from drafts.errors import UserError

CHANCES = np.array([0.73, 0.71, 0.68])


def test_without_acceptance_every_token_takes_a_step() -> None:
    assert expected_steps(np.zeros(3), 17) == pytest.approx(17)


def test_with_full_acceptance_the_last_step_is_cut_off() -> None:
    assert expected_steps(np.ones(3), 17) == pytest.approx(5)  # 4 + 4 + 4 + 4 + 1


def test_by_hand_for_two_tokens() -> None:
    """The first step yields two tokens with chance 0.73, one without."""
    assert expected_steps(CHANCES[:1], 2) == pytest.approx(0.73 * 1 + 0.27 * 2)


def test_the_mean_of_many_simulated_answers() -> None:
    generator = np.random.default_rng(1)
    counts = []
    for _ in range(4000):
        steps, left = 0, 40
        while left > 0:
            kept = 0
            while kept < 3 and generator.random() < CHANCES[kept]:
                kept += 1
            steps, left = steps + 1, left - kept - 1
        counts.append(steps)
    error = 4 * np.std(counts) / len(counts) ** 0.5
    assert expected_steps(CHANCES, 40) == pytest.approx(np.mean(counts), abs=error)
    assert expected_steps(CHANCES, 40) > 40 / acceptance_length(CHANCES) + 2 * error / 4


def test_a_smaller_k_is_the_beginning_and_a_larger_goes_on_falling() -> None:
    assert list(at_k(CHANCES, 2)) == [0.73, 0.71]
    more = at_k(CHANCES, 5)
    fall = (0.68 / 0.73) ** 0.5
    assert more[3] == pytest.approx(0.68 * fall)
    assert more[4] == pytest.approx(0.68 * fall**2)
    assert list(at_k(np.array([0.5, 0.6]), 4)) == [0.5, 0.6, 0.6, 0.6]
    assert list(at_k(np.array([0.5]), 3)) == [0.5, 0.5, 0.5]


def test_prompts_keep_their_own_chances() -> None:
    counts = Acceptance(np.array([10, 20, 5]), np.array([[8, 6], [2, 0], [0, 0]]))
    chances = per_prompt(counts, 3)
    np.testing.assert_allclose(chances[0, :2], [0.8, 0.75])
    np.testing.assert_allclose(chances[1, :2], [0.1, 0.0])
    assert chances[2, 0] == 0
    assert chances[2, 1] == pytest.approx(6 / 10)  # never came there: all prompts'
    assert (chances[:, 2] == chances[0, 2]).all()


@pytest.mark.parametrize("length", [1.2, 2.6, 3.7])
def test_a_draft_of_an_asked_length(length: float) -> None:
    assert acceptance_length(with_length(CHANCES, length)) == pytest.approx(length)


@pytest.mark.parametrize("length", [1.0, 4.0, 7.0, float("nan")])
def test_a_length_that_k_cannot_give_is_refused(length: float) -> None:
    with pytest.raises(UserError, match="not possible at k = 3"):
        with_length(CHANCES, length)


def test_shares_by_position_become_chances() -> None:
    np.testing.assert_allclose(from_per_position([0.8, 0.4, 0.1]), [0.8, 0.5, 0.25])
    for wrong in ([0.5, 0.6], [1.2], [0.5, 0.0], [float("nan")], []):
        with pytest.raises(UserError, match="no acceptances by position"):
            from_per_position(wrong)
