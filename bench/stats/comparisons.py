"""The comparisons of a run: which arms are set side by side, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from bench.records.run import ArmRun
from bench.stats.intervals import Quotient
from bench.stats.verdict import ACCEPTANCE, Comparison, compare, correct


def comparisons(
    runs: Sequence[ArmRun], per_block: int, conversations: Sequence[int] | None = None
) -> list[Comparison]:
    """Every arm against no speculation, every two drafts against each other, Holm-corrected.

    Prompt lookup is set against no speculation only: it is a yardstick, not a candidate.
    `per_block` prompts make a block; `conversations` numbers that of each measured request.
    """
    none = next((run for run in runs if run.arm.draft is None), None)
    drafted = [run for run in runs if run.arm.draft not in (None, "ngram")]
    pairs = [(later, earlier) for earlier, later in combinations(drafted, 2)]
    speed = runs[0].speed
    wanted = [(run, none, speed.speedup) for run in runs if none is not None and run is not none]
    for metric in (ACCEPTANCE, speed.rate):
        wanted += [(run, against, metric) for run, against in pairs]
    found = [_compare(*one, per_block, conversations) for one in wanted]
    return correct([comparison for comparison in found if comparison is not None])


def quotient(run: ArmRun, metric: str) -> Quotient | None:
    """What the metric is a quotient of, [rounds, units]; None if the arm has no such measure."""
    if metric != ACCEPTANCE:
        return Quotient(np.array(run.tokens, float), np.array(run.seconds, float))
    if any(counters is None for row in run.counters for counters in row):
        return None
    counts = [[c for c in row if c is not None] for row in run.counters]
    drafts = np.array([[c.drafts for c in row] for row in counts], float)
    accepted = np.array([[c.accepted_tokens for c in row] for row in counts], float)
    return Quotient(drafts + accepted, drafts)


def per_step(run: ArmRun) -> Quotient | None:
    """Tokens that answers kept by steps of the target, [rounds, prompts]; None without counters.

    Acceptance does not say it: a step without a draft, of which n-gram has many, is in none of its
    counts, and of the last step of an answer some accepted tokens may be cut off.
    """
    if not run.kept or any(counters is None for row in run.counters for counters in row):
        return None
    counts = [[c for c in row if c is not None] for row in run.counters]
    accepted = np.array([[c.accepted_tokens for c in row] for row in counts])
    drafts, kept = np.array([[c.drafts for c in row] for row in counts]), np.array(run.kept)
    return Quotient(kept, np.maximum(drafts, kept - accepted))


def _compare(
    run: ArmRun, against: ArmRun, metric: str, per_block: int, conversations: Sequence[int] | None
) -> Comparison | None:
    first, second = quotient(run, metric), quotient(against, metric)
    if first is None or second is None:
        return None
    each_alone = first.over.shape[1] == len(run.outputs[0])  # else a unit is a whole block
    units = (per_block, conversations) if each_alone else ()
    return compare(run.arm.name, against.arm.name, metric, first, second, *units)
