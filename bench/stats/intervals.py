"""Student-t intervals for quotients of sums, when what is summed comes in clusters.

The cells of a table share sources of chance: a prompt with all its rounds, a block on a machine
that was busy just then, a training seed with all its prompts. Each source's variance is estimated
from the cells' influence on the quotient, summed within each cluster (linearisation). Where two
sources cross, their variances add, and that of single cells, which both hold, is taken off one
(Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering").

An interval reaches as far as the root of the summed squares of what each source alone would ask
with its own degrees of freedom (Graybill and Wang 1980, "Confidence intervals on nonnegative
linear combinations of variances"). So two seeds count as two, however many prompts there are;
percentiles of a bootstrap over a handful of clusters would be far too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bench.stats.resample import CONFIDENCE, Figure

Floats = NDArray[np.float64]
SMALLEST_P = 1e-9  # what can be told apart from zero


@dataclass(frozen=True, eq=False)
class Quotient:
    """Sum of `over` by sum of `under`, both [rows, columns] of a table, finite and not negative."""

    over: Floats
    under: Floats

    def __post_init__(self) -> None:
        for name in ("over", "under"):
            object.__setattr__(self, name, np.atleast_2d(np.asarray(getattr(self, name), float)))
        if self.over.shape != self.under.shape:
            raise ValueError(f"shapes differ: {self.over.shape} and {self.under.shape}")

    @property
    def value(self) -> float:
        """The quotient; NaN where it is undefined."""
        total = self.under.sum()
        return float(self.over.sum() / total) if total > 0 else float("nan")

    @property
    def influence(self) -> Floats:
        """[rows, columns]: each cell's first-order effect on the value; they sum to zero."""
        return np.asarray((self.over - self.value * self.under) / self.under.sum())


@dataclass(frozen=True)
class Source:
    """One source of chance: its variance and the degrees of freedom of that estimate."""

    variance: float
    freedom: int


Accounts = Sequence[Sequence[Source]]  # each an account of all chance, as a sum of sources


def clustered(influence: Floats, clusters: ArrayLike) -> Source | None:
    """The variance of the sum of `influence`, if cells of different clusters are independent.

    `clusters` has a label per cell (counted from 0), in a shape that broadcasts to that of
    `influence`. None where there is only one cluster.
    """
    labels = np.broadcast_to(np.asarray(clusters), influence.shape)
    groups = len(np.unique(labels))
    if groups < 2:
        return None
    sums = np.bincount(labels.ravel(), influence.ravel())
    return Source(float(groups / (groups - 1) * (sums**2).sum()), groups - 1)


def beyond(source: Source | None, cells: float) -> list[Source]:
    """What a source adds to another that it crosses: less the variance of single cells."""
    if source is None:
        return []
    return [Source(max(source.variance - cells, 0.0), source.freedom)]


def student(value: float, accounts: Accounts, confidence: float = CONFIDENCE) -> Figure:
    """The value with its interval, the widest that an account asks for; NaN ends without any."""
    if not np.isfinite(value) or not accounts:
        return Figure(value, np.nan, np.nan)
    reach = _reach(accounts, 1 - confidence)
    return Figure(value, value - reach, value + reach)


def p_value(value: float, accounts: Accounts) -> float:
    """The level at which the interval just holds zero; 1 where there is no interval."""
    from scipy.optimize import brentq

    if not np.isfinite(value) or not accounts or value == 0:
        return 1.0
    if _reach(accounts, SMALLEST_P) < abs(value):
        return SMALLEST_P
    return float(brentq(lambda level: _reach(accounts, level) - abs(value), SMALLEST_P, 1.0))


def _reach(accounts: Accounts, level: float) -> float:
    """Half the interval of error rate `level`."""
    from scipy.special import stdtrit  # quantiles of Student's t

    squares = [
        sum(stdtrit(source.freedom, level / 2) ** 2 * source.variance for source in sources)
        for sources in accounts
    ]
    return float(np.sqrt(max(squares)))
