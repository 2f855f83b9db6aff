"""Figures over training seeds x prompts: both kinds of chance in one interval.

Tables are [seeds, prompts] (row s: the draft trained with seed s, on each prompt). `over` / `under`
are what the figure is a quotient of: drafts + accepted tokens over drafts for acceptance length,
tokens over seconds for speed. An arm that was not trained has one row.

Training again and asking other prompts would both change a figure. Seeds and prompts cross (every
seed is measured on every prompt), so that the two variances can be told apart and added, see
`bench.stats.intervals`. With the two to five seeds that one can pay for, a bootstrap over seeds
would be far too narrow; Student's t with each source's own degrees of freedom is not. With one seed
the interval holds only the prompts' chance and says nothing of training.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from bench.stats.intervals import Accounts, Floats, Quotient, beyond, clustered, student
from bench.stats.resample import Figure
from bench.stats.verdict import Comparison, contrast


def seeded_figure(over: ArrayLike, under: ArrayLike) -> Figure:
    """The quotient of sums of two tables [seeds, prompts], with its 95% interval."""
    table = Quotient(np.asarray(over, float), np.asarray(under, float))
    return student(table.value, seeded_sources([table.influence]))


def seeded_comparison(
    arm: str,
    against: str,
    metric: str,
    first: Quotient,
    second: Quotient,
    *,
    paired_seeds: bool = False,
) -> Comparison:
    """Compare two arms on the same prompts, in the same order.

    `paired_seeds`: row s of both arms shares what the seed decides (data order), so that its
    chance cancels as far as it does. Otherwise each arm's seeds are its own, and may be fewer.
    Raises `ValueError` if the tables do not fit each other.
    """
    if first.over.shape[1] != second.over.shape[1]:
        raise ValueError(f"prompts differ: {first.over.shape[1]} and {second.over.shape[1]}")
    if paired_seeds and len(first.over) != len(second.over):
        raise ValueError(f"seeds differ: {len(first.over)} and {len(second.over)}")

    def accounts(weight: float, other: float) -> Accounts:
        parts = [weight * first.influence, -other * second.influence]
        return seeded_sources([parts[0] + parts[1]] if paired_seeds else parts)

    return contrast(arm, against, metric, first.value, second.value, accounts)


def seeded_sources(influences: list[Floats]) -> Accounts:
    """The chance in a sum of tables [seeds, prompts] that share their prompts and not their seeds.

    Prompts come with the chance of single cells (a seed on a prompt); each table's seeds add what
    is beyond that, estimated by the residual of both means.
    """
    per_prompt = np.sum([influence.sum(axis=0) for influence in influences], axis=0)
    prompts = clustered(per_prompt, np.arange(len(per_prompt)))
    if prompts is None:
        return []
    sources = [prompts]
    for influence in influences:
        seeds, columns = influence.shape
        if seeds > 1:
            rows = influence.mean(axis=1, keepdims=True)
            residual = influence - rows - influence.mean(axis=0) + influence.mean()
            cell = (residual**2).sum() / ((seeds - 1) * (columns - 1))
            sources += beyond(clustered(influence, np.arange(seeds)[:, None]), cell * residual.size)
    return [sources]
