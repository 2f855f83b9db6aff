"""Has acceptance fallen? A sequential test that may be looked at after every request.

Units are requests, or spans between two looks at a server's counters: (drafts, accepted tokens).
The first ones make the baseline: accepted tokens per draft r0, and how much units scatter about it
(phi: the variance of a unit's accepted tokens is phi times its drafts). Later ones are held against
r0's lower bound by a mixture of likelihood ratios, over sizes of the drop and over the blocks in
which it may have begun, whose weights add up to one. While nothing has changed, its expectation is
at most one however long one looks, so that (Ville's inequality) it ever passes 2 / alpha with a
probability of alpha / 2 at most; the other half of alpha is for the bound. After Lorden (1971) and
Howard et al. (2021), with the normal in place of the unknown distribution: units of one draft that
is seldom accepted are too few to trust it, units of 20 and more drafts do well (tests).

What it cannot know: units that hang together (a conversation's turns) scatter less than they seem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist

DROPS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)  # in acceptance length
BLOCK = 20  # units in which a drop may begin


@dataclass
class Drift:
    """The test. `alpha`: the chance of ever calling a drop where there is none.

    `baseline_units` and `baseline_drafts` are both needed before anything is judged.
    """

    alpha: float = 0.05
    baseline_units: int = 100
    baseline_drafts: int = 3000
    units: int = 0
    drafts: int = 0
    accepted: int = 0
    _seen: list[tuple[int, int]] = field(default_factory=list)
    _baseline: tuple[float, float, float] | None = None  # r0, its lower bound, phi
    _ratios: list[float] = field(default_factory=lambda: [0.0] * len(DROPS))
    _judged: int = 0
    _peak: float = 0.0

    def add(self, drafts: int, accepted: int) -> bool:
        """Take a unit; is a drop called, now or before? Units without drafts say nothing."""
        if drafts <= 0:
            return self.dropped
        self.units, self.drafts, self.accepted = (
            self.units + 1, self.drafts + drafts, self.accepted + accepted,
        )  # fmt: skip
        if self._baseline is None:
            self._seen.append((drafts, accepted))
            if self.units >= self.baseline_units and self.drafts >= self.baseline_drafts:
                self._baseline = self._learned()
                self._seen.clear()
            return False
        self._judge(drafts, accepted)
        return self.dropped

    @property
    def baseline(self) -> float | None:
        """Acceptance length before; None while it is learned."""
        return None if self._baseline is None else 1 + self._baseline[0]

    @property
    def statistic(self) -> float:
        """How far it has got, 1 being the call: the largest value so far on a logarithmic scale."""
        return max(0.0, math.log(max(self._peak, 1.0)) / math.log(2 / self.alpha))

    @property
    def dropped(self) -> bool:
        """Is a drop called?"""
        return self._peak >= 2 / self.alpha

    def _learned(self) -> tuple[float, float, float]:
        rate = self.accepted / self.drafts
        scatter = sum((a - rate * d) ** 2 for d, a in self._seen) / self.drafts
        phi = max(scatter * self.units / (self.units - 1), 1e-6)
        z = NormalDist().inv_cdf(1 - self.alpha / 2)
        return rate, rate - z * math.sqrt(phi / self.drafts), phi

    def _judge(self, drafts: int, accepted: int) -> None:
        assert self._baseline is not None
        _, bound, phi = self._baseline
        block, first = divmod(self._judged, BLOCK)
        weight = 1 / ((block + 1) * (block + 2)) if first == 0 else 0.0
        self._judged += 1
        for i, drop in enumerate(DROPS):
            gain = drop * (bound * drafts - accepted) / phi - drop**2 * drafts / (2 * phi)
            self._ratios[i] = (self._ratios[i] + weight) * math.exp(min(gain, 500.0))
        begun = 1 - 1 / (block + 2)  # the weights so far; the others' ratios are still one
        self._peak = max(self._peak, sum(self._ratios) / len(DROPS) + 1 - begun)
