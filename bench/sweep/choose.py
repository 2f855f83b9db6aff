"""Which k to serve with at each load, with the choice's own uncertainty counted in.

The highest of several measured speedups is too high on average: it was chosen for being high. Here
every k gets an interval at a level that holds for all of them at once (Bonferroni), and the k is
taken whose lower end is highest: that speedup is to be had whichever k had been chosen. Where no
lower end is above one, no speculation is the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.stats.resample import Figure
from bench.sweep.best_k import Speedup


@dataclass(frozen=True)
class Choice:
    """What to serve with at a load: `k` tokens a step, 0 for no speculation. `figure` is the
    speedup of the best k with its interval among all."""

    concurrency: int
    k: int
    figure: Figure
    words: str


def choose(concurrency: int, candidates: Sequence[Speedup]) -> Choice:
    """The choice among several k, measured on the same prompts at one concurrency."""
    figures = {one.k: one.among(len(candidates)) for one in candidates}
    best = max(figures, key=lambda k: (_low(figures[k]), figures[k].value))
    figure = figures[best]
    said = f"k = {best}, {_words(figure)}" if len(figures) > 1 else _words(figure)
    at = f"at {concurrency} at once"
    if _low(figure) > 1:
        close = [k for k, other in figures.items() if k != best and _high(other) > _low(figure)]
        also = f"; not told apart from it: {', '.join(map(str, sorted(close)))}" if close else ""
        return Choice(concurrency, best, figure, f"{at}: {said}{also}")
    worse = all(_high(other) < 1 for other in figures.values())
    why = "costs time" if worse else "is not shown to pay"
    return Choice(concurrency, 0, figure, f"{at}: no speculation, which {why} ({said} at best)")


def _low(figure: Figure) -> float:
    return figure.low if np.isfinite(figure.low) else 0.0


def _high(figure: Figure) -> float:
    return figure.high if np.isfinite(figure.high) else float("inf")


def _words(figure: Figure) -> str:
    if not np.isfinite(figure.low):
        return f"{figure.value:.2f} times (too few waves for an interval)"
    return f"{figure.value:.2f} times ({figure.low:.2f} to {figure.high:.2f})"
