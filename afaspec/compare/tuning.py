"""The rule that chooses each arm's learning rate, the same for every arm, rank and budget.

Every rate of the grid is tried on the tuning seed. The best acceptance length on the validation
side wins; rates within `tie` of the best count as equal, and the smallest of them is taken. Where
that is the lowest or the highest rate tried, the grid grows at that end by its own factor, at most
`extensions` times. A grid of one rate is taken as it is, without a try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from afaspec.compare.config import TuningConfig


@dataclass(frozen=True)
class Choice:
    """What the tries so far say. `rate` is None while `untried` rates are still to be trained.

    `at_edge` says that the best rate is still at an end of all that was tried.
    """

    rate: float | None
    tries: dict[float, float] = field(default_factory=dict)
    untried: tuple[float, ...] = ()
    at_edge: bool = False


def choose(grid: Sequence[float], tries: Mapping[float, float], rule: TuningConfig) -> Choice:
    """The choice among `grid` (rising) and its extensions.

    `tries` maps rates to acceptance lengths on the validation side; others than the grid's and its
    extensions are left aside.
    """
    rates = list(grid)
    if len(rates) == 1:
        return Choice(rates[0])
    for left in range(rule.extensions, -1, -1):
        known = {rate: tries[rate] for rate in rates if rate in tries}
        if untried := tuple(rate for rate in rates if rate not in tries):
            return Choice(None, known, untried)
        best = best_rate(known, rule.tie)
        beyond = beyond_edge(best, rates)
        if beyond is None or left == 0:
            return Choice(best, known, at_edge=beyond is not None)
        rates = sorted([*rates, beyond])
    raise AssertionError("unreachable")


def best_rate(tries: Mapping[float, float], tie: float) -> float:
    """The smallest rate whose acceptance length is within `tie` of the best."""
    best = max(tries.values())
    return min(rate for rate, length in tries.items() if length >= best * (1 - tie))


def beyond_edge(rate: float, rates: Sequence[float]) -> float | None:
    """The rate next to an end of `rates` (rising) at the grid's own factor; None inside."""
    if rate == rates[0]:
        return _rounded(rate * rate / rates[1])
    if rate == rates[-1]:
        return _rounded(rate * rate / rates[-2])
    return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
