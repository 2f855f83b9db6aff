"""The definitions of acceptance, on counts small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.records.acceptance import Acceptance
from serving.metrics import SpecCounters


def by_hand() -> Acceptance:
    """Two prompts, 10 and 6 drafts; accepted 8+4, 6+2, 3+1."""
    return Acceptance(np.array([10, 6]), np.array([[8, 6, 3], [4, 2, 1]]))


def test_definitions() -> None:
    acceptance = by_hand()
    assert acceptance.k == 3
    assert acceptance.acceptance_length == 1 + 24 / 16
    assert acceptance.acceptance_rate == 24 / 48
    np.testing.assert_allclose(acceptance.per_position, [12 / 16, 8 / 16, 4 / 16])
    np.testing.assert_allclose(acceptance.conditional, [12 / 16, 8 / 12, 4 / 8])


def test_length_is_one_plus_the_sum_over_positions() -> None:
    acceptance = by_hand()
    assert acceptance.acceptance_length == pytest.approx(1 + acceptance.per_position.sum())


def test_rate_counts_the_tokens_that_were_drafted() -> None:
    """A drafter that proposes fewer than k tokens is not charged for the others."""
    counters = [SpecCounters(4, 6, 3, (2, 1)), SpecCounters(0, 0, 0, ())]
    acceptance = Acceptance.from_counters(counters, k=3)
    assert acceptance.acceptance_rate == 3 / 6
    assert acceptance.accepted_per_prompt.tolist() == [[2, 1, 0], [0, 0, 0]]


def test_nothing_drafted_is_undefined_not_zero() -> None:
    acceptance = Acceptance(np.array([0]), np.array([[0, 0]]))
    assert np.isnan(acceptance.acceptance_length)
    assert np.isnan(acceptance.acceptance_rate)
    assert np.isnan(acceptance.conditional).all()


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="before it"):
        Acceptance(np.array([3]), np.array([[1, 2]]))
    with pytest.raises(ValueError, match="before it"):
        Acceptance(np.array([1]), np.array([[2, 1]]))
    with pytest.raises(ValueError, match="expected"):
        Acceptance(np.array([1, 2]), np.array([[1, 1]]))
