"""One arm in two runs: is the difference more than chance?

Where both runs measured the same prompts and kept their measurements, prompts are paired: what
makes one slow or hard to draft does so in both runs. Otherwise all there is are the two reports'
intervals, taken as independent, which is wider.

Neither sees what a whole run has in common, such as a busy or warmer machine. It changes tokens
per second; it cancels in the speedup, whose two arms took turns in the same run. What one process
of an engine has over another cancels in nothing: several runs of the old kind show how much it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bench.records.arms import Arm
from bench.records.run import ArmRun
from bench.records.speeds import FIGURES, SPEEDUPS, speed_of
from bench.report.schema import Report
from bench.stats.comparisons import quotient
from bench.stats.intervals import Accounts, Floats, Source
from bench.stats.verdict import Comparison, contrast, paired_accounts
from serving.metrics import SpecCounters

ROUNDING = 1e-9
NORMAL_95 = 1.96  # standard errors in half of a 95% interval

Json = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure of one run, and each cell's first-order effect on it [rounds, units]."""

    value: float
    influence: Floats


@dataclass(frozen=True)
class Repeats:
    """A figure in `runs` runs of the same thing: their mean, and the variance from run to run."""

    mean: float
    variance: float
    runs: int

    def with_run(self, accounts: Callable[[float, float], Accounts]) -> Callable[..., Accounts]:
        """`accounts` of u x another run - v x the mean, and one of what differs from run to run."""

        def both(weight: float, other: float) -> Accounts:
            within = accounts(weight, other)
            factor = weight**2 + other**2 / self.runs
            return within and [*within, [Source(factor * self.variance, self.runs - 1)]]

        return both


def repeats_of(reports: Sequence[Report], name: str, metric: str) -> Repeats | None:
    """An arm's figure in several runs; None where fewer than two have it."""
    found = [figure for report in reports if (figure := _figure(report, name, metric))]
    if len(found) < 2:
        return None
    values = np.array([figure["value"] for figure in found])
    return Repeats(float(values.mean()), float(values.var(ddof=1)), len(values))


def compare_arm(
    old: Report, new: Report, name: str, metric: str, repeats: Repeats | None = None
) -> tuple[Comparison, bool] | None:
    """The arm in `new` beside the same in `old`, and whether prompts were paired.

    With `repeats` of `old`, of which it is one, beside their mean, and no nearer than they are to
    each other. None where either run has no such figure, or its verdicts are about another speed.
    """
    found, before = (_figure(report, name, metric) for report in (new, old))
    if found is None or before is None:
        return None
    if paired(old, new):
        first, second = (estimate(report, name, metric) for report in (new, old))
        if first and second and first.influence.shape[1] == second.influence.shape[1]:
            units = first.influence.shape[1]
            unit, per_block = np.arange(units), 1
            if units == len(new.measurements["prompts"]):  # else a unit is a whole block
                unit = np.array(new.measurements.get("conversations") or unit)
                per_block = int(new.provenance.get("block", 1))
            return _compare_paired(name, metric, first, second, unit, per_block, repeats), True
    here = source_of(found, int(new.provenance["prompts"]))
    there = source_of(before, int(old.provenance["prompts"]))

    def accounts(weight: float, other: float) -> Accounts:
        if here is None or there is None:
            return []
        pairs = ((weight, here), (other, there))
        return [[Source(factor**2 * one.variance, one.freedom) for factor, one in pairs]]

    value, other = float(found["value"]), float(before["value"])
    if repeats:
        return contrast(name, name, metric, value, repeats.mean, repeats.with_run(accounts)), False
    return contrast(name, name, metric, value, other, accounts), False


def paired(old: Report, new: Report) -> bool:
    """Whether both runs asked the same prompts, and kept what each gave."""
    hashes = [report.provenance.get("prompts_sha256") for report in (old, new)]
    return (
        hashes[0] is not None
        and hashes[0] == hashes[1]
        and old.measurements.get("prompts") == new.measurements.get("prompts")
        and "arms" in old.measurements
        and "arms" in new.measurements
    )


def estimate(report: Report, name: str, metric: str) -> Estimate | None:
    """The figure from the run's measurements; None where it did not measure that."""
    arms = report.measurements["arms"]
    found = quotient(_run(name, arms[name]), metric) if name in arms else None
    if found is None or not found.value > 0:
        return None
    if metric not in SPEEDUPS:
        return Estimate(found.value, found.influence)
    plain = next((arm["name"] for arm in report.arms if arm["provenance"]["method"] is None), None)
    if plain not in arms:
        return None
    base = quotient(_run(str(plain), arms[plain]), SPEEDUPS[metric].rate)
    assert base is not None  # every run has times
    value = found.value / base.value
    relative = found.influence / found.value - base.influence / base.value
    return Estimate(value, value * relative)


def source_of(figure: Json, prompts: int) -> Source | None:
    """The chance in a reported figure, read off its 95% interval; None without one.

    An interval of no width is none: older reports have such from a single prompt.
    """
    if figure["low"] is None or figure["high"] is None or prompts < 2:
        return None
    if figure["low"] == figure["high"]:
        return None
    error = (figure["high"] - figure["low"]) / (2 * NORMAL_95)
    return Source(error**2, prompts - 1)


def _compare_paired(
    name: str,
    metric: str,
    first: Estimate,
    second: Estimate,
    unit: np.ndarray,
    per_block: int,
    repeats: Repeats | None,
) -> Comparison:
    """As `bench.stats.verdict.compare` does within a run, cell by cell."""
    tables = [first.influence, second.influence]
    if tables[0].shape != tables[1].shape:  # other numbers of rounds: all of a prompt's together
        tables = [table.sum(axis=0, keepdims=True) for table in tables]

    def accounts(weight: float, other: float) -> Accounts:
        return paired_accounts(weight * tables[0] - other * tables[1], metric, unit, per_block)

    if repeats:
        value, mean = first.value, repeats.mean
        return contrast(name, name, metric, value, mean, repeats.with_run(accounts))
    same = math.isclose(first.value, second.value, rel_tol=ROUNDING)
    other = first.value if same else second.value  # rounding is no difference, however certain
    return contrast(name, name, metric, first.value, other, accounts)


def _figure(report: Report, name: str, metric: str) -> Json | None:
    arm = next((arm for arm in report.arms if arm["name"] == name), None)
    if arm is None or not arm[metric] or arm[metric]["value"] is None:
        return None
    if metric in FIGURES and metric not in (speed_of(arm).rate, speed_of(arm).speedup):
        return None  # its measurements are of another
    if arm["provenance"]["method"] is None and metric in SPEEDUPS:
        return None  # 1 by definition
    return cast(Json, arm[metric])


def _run(name: str, arm: Json) -> ArmRun:
    """What an arm gave, as far as figures need it, from its measurements."""
    counters = [[None if c is None else SpecCounters(**c) for c in row] for row in arm["counters"]]
    return ArmRun(Arm(name), tokens=arm["tokens"], seconds=arm["seconds"], counters=counters)
