"""Which k is best at each concurrency, and from which load on speculation no longer pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.records.acceptance import Floats
from bench.records.run import Series
from bench.records.speeds import REQUEST
from bench.stats.intervals import Accounts, Quotient, clustered, student
from bench.stats.resample import CONFIDENCE, Figure
from bench.stats.verdict import NO_DIFFERENCE, contrast, correct
from bench.sweep.cells import CellResult

PAYS, COSTS, UNCLEAR = "pays", "costs time", "is not shown to pay"


@dataclass(frozen=True, eq=False)
class Speedup:
    """A cell's speedup, and how much each wave [rounds, waves] moved it (relative influence)."""

    k: int
    value: float
    influence: Floats

    @property
    def figure(self) -> Figure:
        """With its interval, over waves of prompts."""
        return self.among(1)

    def among(self, candidates: int) -> Figure:
        """The same at a level that holds for so many candidates at once (Bonferroni): the highest
        of several is too high on average, as it was chosen for being high."""
        level = 1 - (1 - CONFIDENCE) / candidates
        log = student(float(np.log(self.value)), accounts(self.influence), level)
        return Figure(*(float(np.exp(end)) for end in (log.value, log.low, log.high)))


@dataclass(frozen=True)
class Best:
    """The k of the highest speedup, and those that cannot be told apart from it."""

    concurrency: int
    k: int
    figure: Figure
    tied: tuple[int, ...]
    pays: str
    words: str

    def as_json(self) -> dict[str, Any]:
        """By name, as sweep.json has it."""
        return {**vars(self), "figure": self.figure.as_json(), "tied": list(self.tied)}


def speed(series: Series, concurrency: int) -> Quotient:
    """Tokens/s of one request while all of a wave run: decoded tokens by the requests' own time."""
    return Quotient(wave_sums(series.tokens, concurrency), wave_sums(series.seconds, concurrency))


def speedup(cell: CellResult) -> Speedup:
    """Speed with the draft by speed without, measured beside it."""
    assert cell.series is not None
    assert cell.none is not None
    fast, plain = speed(cell.series, cell.concurrency), speed(cell.none, cell.concurrency)
    influence = fast.influence / fast.value - plain.influence / plain.value
    return Speedup(cell.k, fast.value / plain.value, influence)


def accounts(influence: Floats) -> Accounts:
    """What moves a speedup: prompts (a wave with all rounds), or waves where those vary more."""
    rounds, waves = influence.shape
    by_prompts = clustered(influence, np.arange(waves))
    by_wave = clustered(influence, np.arange(rounds * waves).reshape(rounds, waves))
    return [[source] for source in (by_prompts, by_wave) if source is not None and by_prompts]


def best_k(concurrency: int, candidates: Sequence[Speedup]) -> Best:
    """The best of several k at one concurrency, all measured on the same prompts.

    Each is compared with the best one, paired by wave; a k is ruled out where the difference is
    shown (95%, Holm's correction for their number; two-sided, which asks more than multiple
    comparisons with the best: Hsu 1981, "Simultaneous confidence intervals for all distances from
    the best"). The best one's interval, and whether it pays, allow for its having been chosen.
    """
    best = max(candidates, key=lambda candidate: candidate.value)
    others = [candidate for candidate in candidates if candidate is not best]
    comparisons = correct(
        [
            contrast(
                f"k={best.k}",
                f"k={other.k}",
                REQUEST.speedup,
                best.value,
                other.value,
                lambda u, v, other=other: accounts(  # type: ignore[misc]
                    u * best.value * best.influence - v * other.value * other.influence
                ),
            )
            for other in others
        ]
    )
    tied = {
        other.k
        for other, found in zip(others, comparisons, strict=True)
        if found.verdict == NO_DIFFERENCE
    }
    figure = best.among(len(candidates))
    below = all(candidate.figure.high < 1 for candidate in candidates)
    pays = PAYS if figure.low > 1 else COSTS if below else UNCLEAR
    close = sorted((c for c in candidates if c.k in tied or c is best), key=lambda c: c.k)
    return Best(
        concurrency,
        best.k,
        figure,
        tuple(sorted(tied)),
        pays,
        _words(concurrency, close, figure, others),
    )


def load_advice(bests: Sequence[Best]) -> str:
    """Whether to draft at each measured load, lowest first, in a sentence."""
    groups = {
        kind: [b.concurrency for b in bests if b.pays == kind] for kind in (PAYS, UNCLEAR, COSTS)
    }
    said = [f"{kind} at concurrency {_list(loads)}" for kind, loads in groups.items() if loads]
    text = f"Speculation {', '.join(said)}."
    off = _off_from(bests)
    if off == 0:
        return f"{text} It should be off at every load measured."
    if off is not None:
        return f"{text} It should be off above concurrency {bests[off - 1].concurrency}."
    if groups[PAYS] == [b.concurrency for b in bests]:
        return f"{text} No load was measured at which it should be off."
    return text


def schedule(bests: Sequence[Best]) -> list[list[int]]:
    """What to draft with at each load, as `ranges` has it; k is 0 where it costs."""
    return ranges({best.concurrency: 0 if best.pays == COSTS else best.k for best in bests})


def ranges(ks: Mapping[int, int]) -> list[list[int]]:
    """`[from, to, k]` for vLLM's num_speculative_tokens_per_batch_size, of the k at some loads.

    Between two measured loads the higher one decides; the last entry holds beyond it too.
    """
    entries: list[list[int]] = []
    low = 1
    for load in sorted(ks):
        if entries and entries[-1][2] == ks[load]:
            entries[-1][1] = load
        else:
            entries.append([low, load, ks[load]])
        low = load + 1
    return entries


def _off_from(bests: Sequence[Best]) -> int | None:
    """Index of the first load from which on speculation costs time at every one measured."""
    for index in range(len(bests)):
        if all(best.pays == COSTS for best in bests[index:]):
            return index
    return None


def _words(
    concurrency: int, close: Sequence[Speedup], figure: Figure, others: Sequence[Speedup]
) -> str:
    at = f"at concurrency {concurrency}"
    if len(close) > 1:
        names = _list([f"k={c.k}" for c in close])
        values = _list([f"{c.value:.2f}×" for c in close])
        return f"{names} cannot be told apart {at} ({values})"
    said = f"{figure.value:.2f}×, {figure.low:.2f} to {figure.high:.2f}"
    if not others:
        return f"k={close[0].k} is the only one measured {at} ({said})"
    following = max(others, key=lambda c: c.value)
    return (
        f"k={close[0].k} is best {at} ({said}); next comes k={following.k}, {following.value:.2f}×"
    )


def wave_sums(rows: Sequence[Sequence[float]], concurrency: int) -> Floats:
    """[rounds, prompts] summed to [rounds, waves]."""
    table = np.asarray(rows, dtype=np.float64)
    return table.reshape(len(table), -1, concurrency).sum(axis=2)


def _list(values: Sequence[object]) -> str:
    """`1, 2 and 3`."""
    texts = [str(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
