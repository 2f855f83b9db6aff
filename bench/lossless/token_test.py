"""Were these tokens drawn from these distributions? A test, and what it would have found.

The data are groups of draws: all that were made after one prefix, with the target's own
probabilities there. Two chi-square tests look at them. The first adds up, over all prefixes, how
often the most probable token came, the second most probable, and so on by classes of rank, against
how often each should have: powerful against a rule that favours likely (or unlikely) tokens
everywhere. The second compares token by token after prefixes that came often enough: it sees a
favour for particular tokens that evens out over ranks. The p-value is Bonferroni's of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RANK_CLASSES = (0, 1, 2, 3, 5, 10)  # first rank (from 0) of each class; what is left is the last
FEWEST = 5.0  # expected draws that make a cell of a chi-square test


@dataclass(frozen=True, eq=False)
class Draws:
    """`counts` [G, L + 1] of draws after G prefixes and their `chances` [G, L + 1] by the target.

    Columns are the prefix's L most probable tokens, best first; the last is all other tokens.
    """

    counts: Floats
    chances: Floats

    @property
    def sizes(self) -> Floats:
        """[G]: draws after each prefix."""
        return np.asarray(self.counts.sum(axis=1))


@dataclass(frozen=True)
class ChiSquare:
    """A chi-square statistic, and the `signal` that the planted bias would add to it.

    The planted bias takes the most probable token outright in a share w of draws: it adds
    w squared times `signal` to the statistic's expectation.
    """

    statistic: float
    freedom: int
    signal: float


def chi_squares(draws: Draws) -> list[ChiSquare]:
    """The two tests; fewer where the draws leave one nothing to test."""
    tests = [_by_rank(draws), _by_prefix(draws)]
    return [test for test in tests if test is not None]


def chance(tests: list[ChiSquare]) -> float:
    """The p-value of the tests together; 1 without any."""
    from scipy.stats import chi2

    values = [float(chi2.sf(test.statistic, test.freedom)) for test in tests]
    return min(1.0, len(tests) * min(values)) if values else 1.0


def power(tests: list[ChiSquare], draws: Draws, bias: float, alpha: float) -> float:
    """How likely a planted bias is found at level `alpha`: at least this, by the better test.

    `bias` is the total variation between target and output, the mean over the tested tokens.
    """
    from scipy.stats import chi2, ncx2

    share = bias / _room(draws) if _room(draws) > 0 else np.inf
    if share > 1:
        return 0.0
    return max(
        (
            float(ncx2.sf(chi2.isf(alpha / len(tests), test.freedom), test.freedom, excess))
            for test in tests
            if (excess := share**2 * test.signal) > 0
        ),
        default=0.0,
    )


def smallest_found(
    tests: list[ChiSquare], draws: Draws, alpha: float, certainty: float = 0.9
) -> float | None:
    """The smallest planted bias (total variation) that is found with `certainty`, or None."""
    from scipy.optimize import brentq

    most = _room(draws)
    if most <= 0 or power(tests, draws, most, alpha) < certainty:
        return None
    return float(brentq(lambda bias: power(tests, draws, bias, alpha) - certainty, 0.0, most))


def _room(draws: Draws) -> float:
    """The planted bias's total variation if it took the most probable token always."""
    return float(np.average(1 - draws.chances[:, 0], weights=draws.sizes))


def _by_rank(draws: Draws) -> ChiSquare | None:
    columns = draws.chances.shape[1]
    starts = [start for start in RANK_CLASSES if start < columns - 1] + [columns - 1]
    sizes = draws.sizes

    def classes(table: Floats) -> Floats:
        return np.asarray(np.add.reduceat(table, starts, axis=1))

    while len(starts) > 1:  # merge from the tail until every class is expected often enough
        expected = sizes @ classes(draws.chances)
        if expected.min() >= FEWEST:
            break
        del starts[max(1, int(expected.argmin()))]
    if len(starts) < 2:
        return None
    chances = classes(draws.chances)
    expected = sizes @ chances
    covariance = np.diag(expected) - (chances * sizes[:, None]).T @ chances
    inverse = np.linalg.pinv(covariance, hermitian=True)
    off = classes(draws.counts).sum(axis=0) - expected
    shift = -expected
    shift[0] += sizes.sum()
    return ChiSquare(
        statistic=float(off @ inverse @ off),
        freedom=int(np.linalg.matrix_rank(covariance, hermitian=True)),
        signal=float(shift @ inverse @ shift),
    )


def _by_prefix(draws: Draws) -> ChiSquare | None:
    statistic, freedom, signal = 0.0, 0, 0.0
    common = draws.sizes >= 2 * FEWEST
    table = zip(draws.counts[common], draws.chances[common], draws.sizes[common], strict=True)
    for counts, chances, size in table:
        expected = size * chances
        single = expected >= FEWEST
        single[-1] = False  # the other tokens join what is too rare for a cell of its own
        cells = np.append(expected[single], expected[~single].sum())
        found = np.append(counts[single], counts[~single].sum())
        top = np.append(np.arange(len(counts))[single] == 0, not single[0]).astype(float)
        if cells[-1] < FEWEST:  # still too rare: it joins the rarest other cell
            cells, found, top = (_joined(values) for values in (cells, found, top))
        if len(cells) < 2:
            continue
        shift = size * top - cells
        statistic += float(((found - cells) ** 2 / cells).sum())
        signal += float((shift**2 / cells).sum())
        freedom += len(cells) - 1
    return ChiSquare(statistic, freedom, signal) if freedom else None


def _joined(values: Floats) -> Floats:
    """The last cell added to the one before it, which is the rarest."""
    return np.append(values[:-2], values[-2:].sum())
