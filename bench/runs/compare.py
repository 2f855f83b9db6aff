"""Finished runs side by side: which arms changed, by how much, and what was set otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.records.speeds import MEASURES, RATES, speed_of
from bench.runs.across import compare_arm, repeats_of
from bench.runs.saved import SavedRun
from bench.stats.verdict import ACCEPTANCE, NO_DIFFERENCE, Comparison, correct

SCHEMA = "afaspec-comparison/1"
# What differs between any two runs and says nothing about them.
UNTOLD = {"time", "draft.path", "target.path"}
NAMES = {ACCEPTANCE: "acceptance length"} | {
    metric: name[0].lower() + name[1:] for metric, name in MEASURES.items()
}

Json = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """An arm's figure in the run `new` beside the run `old`. `values` are old and new figures."""

    arm: str
    label: str
    old: str
    new: str
    values: tuple[Json, Json]
    comparison: Comparison
    paired: bool

    @property
    def name(self) -> str:
        """The figure, as a reader calls it."""
        return NAMES[self.comparison.metric]

    @property
    def words(self) -> str:
        """What can be said of it, in a sentence."""
        name = self.name
        how = "same prompts" if self.paired else "unpaired"
        if self.comparison.verdict == NO_DIFFERENCE:
            return (
                f"{self.label}: no difference in {name} shown between {self.new} and {self.old} "
                f"({by_how_much(self.comparison)}; {how})"
            )
        return (
            f"{self.label}: {name} is {self.comparison.verdict} in {self.new} than in {self.old} "
            f"by {by_how_much(self.comparison, signed=False)}; {how}"
        )

    def as_json(self) -> Json:
        """The entry of the comparison's JSON."""
        return {
            **self.comparison.as_json(),
            "arm": self.arm,
            "against": self.arm,
            "run": self.new,
            "against_run": self.old,
            "paired": self.paired,
            "values": {self.old: self.values[0], self.new: self.values[1]},
            "words": self.words,
        }


@dataclass(frozen=True)
class ReportComparison:
    """Every later run against the first. `settings` lists what was not the same, run by run."""

    runs: Sequence[SavedRun]
    changes: Sequence[Change]
    missing: Sequence[str]
    settings: Mapping[str, list[Any]]

    @property
    def cautions(self) -> list[str]:
        """Where the arms without speculation differ in speed, the runs themselves do."""
        plain = {
            arm["name"]
            for run in self.runs
            for arm in run.report.arms
            if arm["provenance"]["method"] is None
        }
        return [
            f"Without any draft the {change.name} of {change.new} is "
            f"{by_how_much(change.comparison)} against {change.old}: the runs differ in more than "
            "their drafts, so compare speedups and not tokens/s"
            for change in self.changes
            if change.arm in plain and change.comparison.verdict != NO_DIFFERENCE
        ]

    def as_json(self) -> Json:
        """The content of comparison.json."""
        return {
            "schema": SCHEMA,
            "runs": [
                {"name": run.name, "path": str(run.path), "time": run.report.provenance.get("time")}
                for run in self.runs
            ],
            "comparisons": [change.as_json() for change in self.changes],
            "missing": list(self.missing),
            "cautions": self.cautions,
            "differing_settings": [
                {"setting": name, "values": values} for name, values in self.settings.items()
            ],
        }


def compare_runs(runs: Sequence[SavedRun]) -> ReportComparison:
    """Compare every run with the first, arm by arm (matched by name) and metric by metric."""
    first, *others = runs
    changes = [change for run in others for change in changes_between(first, run)]
    missing = []
    for run in others:
        for here, there in ((first, run), (run, first)):
            names = {arm["name"] for arm in there.report.arms}
            missing += [
                f"{arm['label']} is in {here.name} and not in {there.name}"
                for arm in here.report.arms
                if arm["name"] not in names
            ]
        missing += _other_speed(first, run)
    return ReportComparison(runs, changes, missing, differing_settings(runs))


def changes_between(old: SavedRun, new: SavedRun, again: Sequence[SavedRun] = ()) -> list[Change]:
    """What changed from `old` to `new`, Holm-corrected over the arms, in the order of `old`.

    With runs that measured the same `again`, what differs from run to run is counted in.
    """
    found = []
    reports = [run.report for run in (old, *again)]
    for arm in old.report.arms:
        name, speed = arm["name"], speed_of(arm)
        for metric in (ACCEPTANCE, speed.rate, speed.speedup):
            repeats = repeats_of(reports, name, metric)
            compared = compare_arm(old.report, new.report, name, metric, repeats)
            if compared is not None:
                before = arm[metric]
                if repeats:
                    before = {"value": repeats.mean, "low": None, "high": None}
                found.append((arm, (before, new.report.arm(name)[metric]), *compared))
    corrected = correct([comparison for _, _, comparison, _ in found])
    against = f"the {len(reports)} baselines" if again else old.name
    return [
        Change(arm["name"], arm["label"], against, new.name, values, comparison, paired)
        for (arm, values, _, paired), comparison in zip(found, corrected, strict=True)
    ]


def _other_speed(first: SavedRun, run: SavedRun) -> list[str]:
    """What to know where the two runs' verdicts are about two kinds of speed."""
    one, other = (speed_of(found.report.arms[0]) for found in (first, run))
    if one is other:
        return []
    return [
        f"{run.name} measured the {other.noun}, {first.name} the {one.noun}: their speeds are not "
        "compared"
    ]


def differing_settings(runs: Sequence[SavedRun]) -> dict[str, list[Any]]:
    """Settings by dotted name, with a value per run, where the runs do not agree.

    What belongs to one arm stands behind its name; arms that a run lacks are left out.
    """
    result: dict[str, list[Any]] = {}
    common = [flat(run.report.provenance) for run in runs]
    for name in dict.fromkeys(name for values in common for name in values):
        _note(result, name, [values.get(name) for values in common], name)
    for arm in runs[0].report.arms:
        name = arm["name"]
        if not all(any(other["name"] == name for other in run.report.arms) for run in runs):
            continue
        own = [
            {
                key: value
                for key, value in flat(run.report.arm(name)["provenance"]).items()
                if key not in shared
            }
            for run, shared in zip(runs, common, strict=True)
        ]
        for key in dict.fromkeys(key for values in own for key in values):
            _note(result, f"{arm['label']}: {key}", [values.get(key) for values in own], key)
    return result


def by_how_much(found: Comparison, *, signed: bool = True) -> str:
    """The difference with its interval: relative for tokens/s, else in the metric's unit.

    Not `signed`: how far it is lower or higher, for sentences that say which.
    """
    relative = found.metric in RATES
    figure, scale, unit = (found.relative, 100.0, "%") if relative else (found.difference, 1.0, "")
    if not signed and figure.value < 0:
        scale = -scale
    value, *ends = (scale * end for end in (figure.value, figure.low, figure.high))
    form = ("+" if signed else "") + (".1f" if relative else ".3f")
    if np.isnan(ends).any():
        return f"{value:{form}}{unit}, no interval"
    low, high = sorted(ends)
    return f"{value:{form}}{unit} ({low:{form}} to {high:{form}})"


def _note(result: dict[str, list[Any]], name: str, values: list[Any], key: str) -> None:
    if key not in UNTOLD and any(value != values[0] for value in values):
        result[name] = values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
