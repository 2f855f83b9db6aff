"""Bootstrap intervals for ratios of sums, paired across arms.

A measured figure here is always a function of sums over prompts (and rounds): accepted tokens
over drafts, tokens over seconds. The bootstrap draws prompts and rounds with replacement and
forms the same sums. One `Resampler` serves all arms of a run, so that a difference or a quotient
of two arms is paired by prompt and round: what makes a prompt slow in one arm does so in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from bench.records.acceptance import Acceptance

CONFIDENCE = 0.95
RESAMPLES = 4000

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A measured value with its interval; NaN (JSON null) where it is undefined."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """The three numbers by name."""
        return {
            name: None if np.isnan(number) else float(number) for name, number in vars(self).items()
        }


class Resampler:
    """Bootstrap weights over `prompts` units and `rounds` rounds, the same for every arm."""

    def __init__(self, prompts: int, rounds: int = 1, *, seed: int = 0, resamples: int = RESAMPLES):
        self._prompts, self._rounds = _both_weights(prompts, rounds, seed, resamples)

    def sums(self, data: np.ndarray) -> Samples:
        """Sums of `data` [rounds, prompts] or [prompts]: the plain sum, then one per resample."""
        table = np.atleast_2d(np.asarray(data, dtype=np.float64))
        return np.einsum("br,br->b", self._rounds, self._prompts @ table.T)


def figure(samples: Samples, confidence: float = CONFIDENCE) -> Figure:
    """The plain value and its percentile interval, from any function of `Resampler.sums`."""
    tail = (1 - confidence) / 2
    resampled = samples[1:][np.isfinite(samples[1:])]
    if not np.isfinite(samples[0]) or not len(resampled):
        return Figure(np.nan, np.nan, np.nan)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Figure(float(samples[0]), float(low), float(high))


def ratio(numerator: Samples, denominator: Samples) -> Samples:
    """Elementwise quotient; NaN where the denominator is 0."""
    return np.divide(
        numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0
    )


@dataclass(frozen=True)
class AcceptanceSamples:
    """Resampled measures of an `Acceptance`; lists hold one entry per draft position."""

    length: Samples
    rate: Samples
    per_position: list[Samples]
    conditional: list[Samples]


def resample_acceptance(acceptance: Acceptance, resampler: Resampler) -> AcceptanceSamples:
    """The measures of `Acceptance`, over a resampler of its prompts."""
    drafts = resampler.sums(acceptance.drafts_per_prompt)
    accepted = [resampler.sums(column) for column in acceptance.accepted_per_prompt.T]
    total = np.sum(accepted, axis=0)
    return AcceptanceSamples(
        length=1 + ratio(total, drafts),
        rate=ratio(total, resampler.sums(acceptance.drafted)),
        per_position=[ratio(column, drafts) for column in accepted],
        conditional=[
            ratio(column, before)
            for column, before in zip(accepted, [drafts, *accepted[:-1]], strict=True)
        ],
    )


@lru_cache(maxsize=2)  # one report asks again and again; those of 10,000 prompts are 160 MB
def _both_weights(prompts: int, rounds: int, seed: int, resamples: int) -> tuple[Samples, Samples]:
    generator = np.random.default_rng(seed)
    return _weights(generator, prompts, resamples), _weights(generator, rounds, resamples)


def _weights(generator: np.random.Generator, units: int, resamples: int) -> Samples:
    """[1 + resamples, units]: how often each unit is drawn; the first row takes each once."""
    drawn = generator.multinomial(units, np.full(units, 1 / units), size=resamples)
    return np.concatenate([np.ones((1, units)), drawn])


PERCENTILES = (50, 90, 99)


def spread(values: np.ndarray) -> dict[str, float] | None:
    """Mean and percentiles of values; None where there are none."""
    if not len(values):
        return None
    percentiles = zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    return {"mean": float(np.mean(values)), **{f"p{p}": float(value) for p, value in percentiles}}
