"""Acceptance of drafted tokens, from counts per prompt: one definition for vLLM and offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.metrics import SpecCounters

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Acceptance:
    """Counts of P prompts at k speculative tokens.

    `drafts_per_prompt` [P]: verified drafts (steps with drafted tokens).
    `accepted_per_prompt` [P, k]: of these, the drafts whose token at position i was accepted.
    `drafted_per_prompt` [P]: drafted tokens; k a draft unless given (n-gram may propose fewer).
    """

    drafts_per_prompt: Counts
    accepted_per_prompt: Counts
    drafted_per_prompt: Counts | None = None

    def __post_init__(self) -> None:
        drafts, accepted = self.drafts_per_prompt, self.accepted_per_prompt
        if drafts.ndim != 1 or accepted.ndim != 2 or len(drafts) != len(accepted):
            raise ValueError(f"expected [P] and [P, k], got {drafts.shape} and {accepted.shape}")
        bounds = np.concatenate([drafts[:, None], accepted], axis=1)
        if (np.diff(bounds, axis=1) > 0).any() or (bounds < 0).any():
            raise ValueError("a token can only be accepted when the one before it was")

    @classmethod
    def from_counters(cls, counters: Sequence[SpecCounters], k: int) -> Acceptance:
        """One prompt per entry. Engines that drafted fewer than k positions are padded with 0."""
        accepted = np.zeros((len(counters), k), dtype=np.int64)
        for row, counter in zip(accepted, counters, strict=True):
            row[: len(counter.accepted_per_position)] = counter.accepted_per_position
        return cls(
            np.array([c.drafts for c in counters], dtype=np.int64),
            accepted,
            np.array([c.draft_tokens for c in counters], dtype=np.int64),
        )

    @property
    def k(self) -> int:
        """Speculative tokens per step."""
        return int(self.accepted_per_prompt.shape[1])

    @property
    def drafted(self) -> Counts:
        """Drafted tokens per prompt [P]."""
        if self.drafted_per_prompt is not None:
            return self.drafted_per_prompt
        return self.drafts_per_prompt * self.k

    @property
    def acceptance_length(self) -> float:
        """1 + accepted tokens / drafts: tokens a step yields, the bonus token counted."""
        return float(1 + _ratio(self.accepted_per_prompt.sum(), self.drafts_per_prompt.sum()))

    @property
    def acceptance_rate(self) -> float:
        """Accepted tokens / drafted tokens."""
        return float(_ratio(self.accepted_per_prompt.sum(), self.drafted.sum()))

    @property
    def per_position(self) -> Floats:
        """[k]: accepted[i] / drafts."""
        return _ratio(self.accepted_per_prompt.sum(axis=0), self.drafts_per_prompt.sum())

    @property
    def conditional(self) -> Floats:
        """[k]: accepted[i] / accepted[i - 1], and accepted[0] / drafts; NaN where undefined."""
        accepted = self.accepted_per_prompt.sum(axis=0)
        return _ratio(accepted, np.append(self.drafts_per_prompt.sum(), accepted[:-1]))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.divide(numerator, denominator, dtype=np.float64))
