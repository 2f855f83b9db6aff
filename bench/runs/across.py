"""One arm in two runs: is the difference more than chance?

Where both runs measured the same prompts and kept their measurements, prompts are paired: what
makes one slow or hard to draft does so in both runs. Otherwise all there is are the two reports'
intervals, taken as independent, which is wider.

Neither sees what a whole run has in common, such as a busy or warmer machine. It changes tokens
per second; it cancels in the speedup, whose two arms took turns in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.report.schema import Report
from bench.stats.intervals import Accounts, Floats, Quotient, Source
from bench.stats.verdict import ACCEPTANCE, SPEED, SPEEDUP, Comparison, contrast, paired_accounts

METRICS = (ACCEPTANCE, SPEED, SPEEDUP)
ROUNDING = 1e-9
NORMAL_95 = 1.96  # standard errors in half of a 95% interval

Json = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure of one run, and each cell's first-order effect on it [rounds, units]."""

    value: float
    influence: Floats


def compare_arm(old: Report, new: Report, name: str, metric: str) -> tuple[Comparison, bool] | None:
    """The arm in `new` beside the same in `old`, and whether prompts were paired.

    None where either run has no such figure.
    """
    figures = [_figure(report, name, metric) for report in (new, old)]
    if figures[0] is None or figures[1] is None:
        return None
    if paired(old, new):
        first, second = (estimate(report, name, metric) for report in (new, old))
        units = [found.influence.shape[1] for found in (first, second) if found]
        if first and second and units[0] == units[1]:
            unit, block = np.arange(units[0]), 1
            if units[0] == len(new.measurements["prompts"]):  # else a unit is a whole turn
                unit = np.array(new.measurements.get("conversations") or unit)
                block = int(new.provenance.get("block", 1))
            return _compare_paired(name, metric, first, second, unit, block), True
    prompts = [int(report.provenance["prompts"]) for report in (new, old)]
    spreads = [
        source_of(figure, units) for figure, units in zip(figures, prompts, strict=True) if figure
    ]

    def accounts(weight: float, other: float) -> Accounts:
        if None in spreads:
            return []
        sources = [
            Source(factor**2 * spread.variance, spread.freedom)
            for factor, spread in zip((weight, other), spreads, strict=True)
            if spread is not None
        ]
        return [sources]

    values = [float(figure["value"]) for figure in figures if figure]
    return contrast(name, name, metric, values[0], values[1], accounts), False


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
    if name not in arms:
        return None
    found = _acceptance(arms[name]) if metric == ACCEPTANCE else _speed(arms[name])
    if found is None or not found.value > 0:
        return None
    if metric != SPEEDUP:
        return Estimate(found.value, found.influence)
    plain = next((arm["name"] for arm in report.arms if arm["provenance"]["method"] is None), None)
    if plain not in arms:
        return None
    base = _speed(arms[plain])
    value = found.value / base.value
    relative = found.influence / found.value - base.influence / base.value
    return Estimate(value, value * relative)


def source_of(figure: Json, prompts: int) -> Source | None:
    """The chance in a reported figure, read off its 95% interval; None without one."""
    if figure["low"] is None or figure["high"] is None or prompts < 2:
        return None
    error = (figure["high"] - figure["low"]) / (2 * NORMAL_95)
    return Source(error**2, prompts - 1)


def _compare_paired(
    name: str, metric: str, first: Estimate, second: Estimate, unit: np.ndarray, block: int
) -> Comparison:
    """As `bench.verdict.compare` does within a run, cell by cell."""
    tables = [first.influence, second.influence]
    if tables[0].shape != tables[1].shape:  # other numbers of rounds: all of a prompt's together
        tables = [table.sum(axis=0, keepdims=True) for table in tables]

    def accounts(weight: float, other: float) -> Accounts:
        return paired_accounts(weight * tables[0] - other * tables[1], metric, unit, block)

    same = math.isclose(first.value, second.value, rel_tol=ROUNDING)
    other = first.value if same else second.value  # rounding is no difference, however certain
    return contrast(name, name, metric, first.value, other, accounts)


def _figure(report: Report, name: str, metric: str) -> Json | None:
    for arm in report.arms:
        if arm["name"] == name and arm[metric] and arm[metric]["value"] is not None:
            plain = arm["provenance"]["method"] is None
            return None if plain and metric == SPEEDUP else arm[metric]  # 1 by definition
    return None


def _acceptance(arm: Json) -> Quotient | None:
    if any(counters is None for row in arm["counters"] for counters in row):
        return None
    drafts = np.array([[c["drafts"] for c in row] for row in arm["counters"]], float)
    accepted = np.array([[c["accepted_tokens"] for c in row] for row in arm["counters"]], float)
    return Quotient(drafts + accepted, drafts)


def _speed(arm: Json) -> Quotient:
    return Quotient(np.array(arm["decode_tokens"], float), np.array(arm["decode_seconds"], float))
