"""What the finished tasks of one domain say: figures over seeds and prompts, and differences.

Seeds and prompts both vary, and an interval holds the chance of both (`bench.stats.seeds`). Arms
trained with the same seed saw the same data in the same order, so differences are paired by seed
as well as by prompt. Verdicts are corrected (Holm) for all that were made in the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from afaspec.compare.config import ArmConfig
from afaspec.compare.plan import Json, Variant
from bench.stats.intervals import Accounts, Floats, Quotient, Source, student
from bench.stats.resample import Figure
from bench.stats.seeds import seeded_comparison, seeded_figure, seeded_sources
from bench.stats.verdict import ACCEPTANCE, Comparison, contrast

REFERENCE_RANK = 8


@dataclass(frozen=True, eq=False)
class Measured:
    """Counts of one draft, or of the drafts of all seeds of a variant, on the same prompts.

    `drafts` [seeds, prompts]; `accepted` [seeds, prompts, k].
    """

    label: str
    drafts: Floats
    accepted: Floats
    variant: Variant | None = None

    @classmethod
    def of(cls, label: str, results: Sequence[Json], variant: Variant | None = None) -> Measured:
        """From the results of evaluated tasks, one per seed."""
        return cls(
            label,
            np.array([r["drafts"] for r in results], dtype=float),
            np.array([r["accepted"] for r in results], dtype=float),
            variant,
        )

    @property
    def length(self) -> Quotient:
        """Acceptance length: tokens of all steps over steps."""
        return Quotient(self.drafts + self.accepted.sum(axis=2), self.drafts)

    @property
    def k(self) -> int:
        return int(self.accepted.shape[2])

    @property
    def seed_values(self) -> list[float]:
        """Acceptance length of each seed."""
        drafts = self.drafts.sum(axis=1)
        return [float(v) for v in 1 + self.accepted.sum(axis=(1, 2)) / drafts]


def figures_of(measured: Measured) -> Json:
    """Acceptance with intervals, as in report.json, and by seed."""
    length, drafts = measured.length, measured.drafts
    return {
        "label": measured.label,
        "acceptance_length": seeded_figure(length.over, length.under).as_json(),
        "acceptance_rate": seeded_figure(
            measured.accepted.sum(axis=2), measured.k * drafts
        ).as_json(),
        "per_position": [
            seeded_figure(measured.accepted[:, :, i], drafts).as_json() for i in range(measured.k)
        ],
        "by_seed": measured.seed_values,
    }


def kept_of(arm: Measured, base: Measured) -> Json:
    """Acceptance length on general prompts, by seed too, and as a share of the base draft's.

    The share's interval is paired by prompt.
    """
    relative = difference(arm, base).relative
    share = Figure(*(1 + end for end in (relative.value, relative.low, relative.high)))
    found = figures_of(arm)
    return {name: found[name] for name in ("acceptance_length", "by_seed")} | {
        "kept": share.as_json()
    }


def difference(arm: Measured, against: Measured) -> Comparison:
    """The difference in acceptance length, paired by prompt, and by seed where both have them."""
    return seeded_comparison(
        arm.label,
        against.label,
        ACCEPTANCE,
        arm.length,
        against.length,
        paired_seeds=len(arm.drafts) == len(against.drafts),
    )


Pairs = list[tuple[Measured, Measured]]


def pooled_difference(arm: str, against: str, by_domain: Sequence[Pairs]) -> Comparison:
    """Two arms over all points of a study at which both were measured, paired by prompt and seed.

    What is compared are geometric means over the points of a domain, then over domains, so that
    `relative` is the mean relative difference. The points of a domain share prompts and seeds; the
    domains share nothing, and their variances add. Each domain has at least one pair.
    """

    def mean(side: int) -> float:
        logs = [np.mean([np.log(pair[side].length.value) for pair in pairs]) for pairs in by_domain]
        return float(np.exp(np.mean(logs)))

    first, second = mean(0), mean(1)

    def accounts(weight: float, other: float) -> Accounts:
        sources: list[Source] = []
        for pairs in by_domain:
            shares = [
                weight * first * one.length.influence / one.length.value
                - other * second * two.length.influence / two.length.value
                for one, two in pairs
            ]
            for account in seeded_sources([np.mean(shares, axis=0) / len(by_domain)]):
                sources += account
        return [sources]

    return contrast(arm, against, ACCEPTANCE, first, second, accounts)


def comparable_pairs(measured: Sequence[Measured], arms: Mapping[str, ArmConfig]) -> Pairs:
    """Pairs of variants that differ in nothing but the arm; an arm without rank meets all ranks.

    Of two arms that say whom they are `against`, one has to name the other.
    """
    pairs = []
    for i, against in enumerate(measured):
        for arm in measured[i + 1 :]:
            one, other = arm.variant, against.variant
            assert one
            assert other
            same_rank = one.rank == other.rank or None in (one.rank, other.rank)
            alike = same_rank and (one.steps, one.samples) == (other.steps, other.samples)
            if one.arm != other.arm and alike and should_compare(one.arm, other.arm, arms):
                pairs.append((arm, against))
    return pairs


def should_compare(one: str, other: str, arms: Mapping[str, ArmConfig]) -> bool:
    """Whether a study asks how these two arms compare."""
    lists = [arms[one].against, arms[other].against]
    if lists == [None, None]:
        return True
    return other in (lists[0] or []) or one in (lists[1] or [])


def gap_closed(arm: Measured, low: Measured, high: Measured) -> Json | None:
    """(arm - low) / (high - low) in acceptance length: 0 is no better than `low`, 1 equals `high`.

    The interval is linearised, paired by seed and prompt. None unless the gap itself is shown: a
    share of nothing means nothing.
    """
    gap = difference(high, low).difference
    if not gap.low > 0:
        return None
    share = (arm.length.value - low.length.value) / gap.value
    parts = [m.length.influence for m in (arm, low, high)]
    influence = (parts[0] - parts[1] - share * (parts[2] - parts[1])) / gap.value
    return dict(student(share, seeded_sources([influence])).as_json())
