"""A gate for CI: is a run worse than the baseline by more than chance?

A regression is an arm of the baseline that is gone, whose requests fail as they did not, whose
acceptance length or speedup is shown to be lower, or whose output is no longer that of the target.
Tokens per second stand in for a speedup only where the baseline has none and the machine is the
same. Runs of other settings are refused rather than compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.records.speeds import RATES, SPEEDUPS, speed_of
from bench.report.schema import load_words, unexplained
from bench.runs.compare import by_how_much, changes_between, flat
from bench.runs.saved import SavedRun
from bench.stats.verdict import ACCEPTANCE
from drafts.errors import UserError

EXIT_CODE = 3
FAILED_SHARE = 0.01  # of the requests; more that fail than in the baseline are a regression
# What must be the same for two runs to be comparable, by dotted name in the provenance.
SETTINGS = (
    "target.sha256", "prompts_sha256", "k", "temperature", "max_tokens", "ignore_eos",
    "concurrency", "loads", "dtype", "mode", "request_body",
)  # fmt: skip
# Why the prompts may differ: of no matter where they do not.
OF_AN_ARM = ("k", "speculative_config")
CAUSES = ("chat_template_sha256", "chat_template_kwargs", "chat_date")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Gate:
    """What was checked (sentences), and what of it failed."""

    checked: list[str]
    failures: list[str]

    @property
    def passed(self) -> bool:
        """Whether nothing got worse."""
        return not self.failures


def check(
    baseline: SavedRun, new: SavedRun, tolerance: float = 0.0, again: Sequence[SavedRun] = ()
) -> Gate:
    """Hold `new` against `baseline`, at every load that they were measured at.

    `tolerance` is the relative loss that is let pass: a lower figure fails only where its whole
    interval lies beyond. With the baseline measured `again` in other runs, figures are held against
    their mean, and differences are no more than chance where those runs differ as much. Raises
    `UserError` where the runs cannot be compared.
    """
    for run in (baseline, *again):
        require_comparable(run, settings_to_match(new.report.provenance))
        _require_same_drafting(run, new)
    found = Gate([], [])
    for (load, now), *before in zip(_loads(new), *map(_loads, (baseline, *again)), strict=True):
        at = f"{load}: " if load else ""
        one = _check([run for _, run in before], now, tolerance)
        found.checked.extend(at + said for said in one.checked)
        found.failures.extend(at + said for said in one.failures)
    return found


def _require_same_drafting(baseline: SavedRun, new: SavedRun) -> None:
    """Raise `UserError` where an arm drafts otherwise than the baseline's of its name."""
    now = {arm["name"]: arm["provenance"] for arm in new.report.arms}
    for arm in baseline.report.arms:
        for name in OF_AN_ARM:
            old, this = arm["provenance"].get(name), now.get(arm["name"], {}).get(name)
            if arm["name"] in now and old != this:
                raise UserError(
                    f"was measured with other settings of {arm['label']}: {name} is {this}, there "
                    f"it is {old}",
                    where=baseline.path,
                    hint="measure with the baseline's settings, or make a new baseline",
                )


def _loads(run: SavedRun) -> list[tuple[str, SavedRun]]:
    """The run at each of its loads, by the load's name; of one load the run itself, without one.

    Measurements by prompt are those of the first load.
    """
    report = run.report
    if not report.load:
        return [("", run)]
    first, *others = report.load
    later = (replace(report, arms=step["arms"], load=None, measurements={}) for step in others)
    return [(load_words(first), run)] + [
        (load_words(step), replace(run, report=one))
        for step, one in zip(others, later, strict=True)
    ]


def _check(baselines: Sequence[SavedRun], new: SavedRun, tolerance: float) -> Gate:
    """One load of all."""
    baseline, *again = baselines
    machines = [run.report.provenance.get("machine") for run in (baseline, new)]
    same_machine = machines[0] is not None and machines[0] == machines[1]
    speed = speed_of(baseline.report.arms[0])
    gated = [ACCEPTANCE, speed.speedup, *([speed.rate] if same_machine else [])]
    names = {arm["name"] for arm in new.report.arms}
    failures = [
        f"{arm['label']}: is missing; the baseline has it"
        for arm in baseline.report.arms
        if arm["name"] not in names
    ]
    checked = []
    changes = [c for c in changes_between(baseline, new, again) if c.comparison.metric in gated]
    has_speedup = any(change.comparison.metric in SPEEDUPS for change in changes)
    for change in changes:
        found = change.comparison
        if has_speedup and found.metric in RATES:
            continue
        checked.append(change.words)
        if found.verdict == "lower" and found.relative.high < -tolerance:
            loss = -100 * found.relative.value
            old, now = (figure["value"] for figure in change.values)
            failures.append(
                f"{change.label}: {change.name} fell by {loss:.1f}%, from {old:.3f} to {now:.3f} "
                f"({by_how_much(found)})"
            )
    for arm in baseline.report.arms:
        if arm["name"] in names:
            now = new.report.arm(arm["name"])
            failures += [*_lost(arm, now, gated), *_failed(arm, now), *_output(arm, now)]
            checked += _unjudged(arm, now)
    return Gate(checked, failures)


def settings_to_match(provenance: Json) -> dict[str, Any]:
    """The values of `SETTINGS` and `CAUSES` in a provenance; None for those it has not."""
    found = {**flat(provenance), **{name: provenance.get(name) for name in CAUSES}}
    found["request_body"] = provenance.get("request_body") or None  # whole; older runs have none
    return {name: found.get(name) for name in (*SETTINGS, *CAUSES)}


def require_comparable(baseline: SavedRun, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` where `settings`, by the names of `SETTINGS`, are not the baseline's."""
    expected = settings_to_match(baseline.report.provenance)
    other = [name for name, value in settings.items() if value != expected[name]]
    if "prompts_sha256" not in other:
        other = [name for name in other if name not in CAUSES]
    differing = [f"{name} is {settings[name]}, there it is {expected[name]}" for name in other]
    if differing:
        raise UserError(
            f"was measured with other settings, so this run cannot be held against it: "
            f"{'; '.join(differing)}",
            where=baseline.path,
            hint="measure with the baseline's settings, or make a new baseline",
        )


def _lost(old: Json, new: Json, gated: list[str]) -> list[str]:
    """Figures of the baseline's arm that the new run did not measure."""
    return [
        f"{old['label']}: has no {metric.replace('_', ' ')} any more"
        for metric in gated
        if old[metric] and old[metric]["value"] is not None
        if not new[metric] or new[metric]["value"] is None
    ]


def _failed(old: Json, new: Json) -> list[str]:
    """Requests that failed: what was measured is of those that did not."""
    (failed, of), (before, among) = (
        ((arm.get("latency") or {}).get("failed", 0), (arm.get("latency") or {}).get("requests", 0))
        for arm in (new, old)
    )
    if not of or failed / of <= (before / among if among else 0.0) + FAILED_SHARE:
        return []
    return [
        f"{old['label']}: {failed} of {of} requests failed; in the baseline {before} of {among}"
    ]


def _unjudged(old: Json, new: Json) -> list[str]:
    """A distribution test that could not say anything: no regression, and no pass either."""
    before, now = (arm.get("distribution") or {} for arm in (old, new))
    if not before.get("passed") or not now or now["passed"] is not None:
        return []
    return [f"{old['label']}: not judged: {now['words'].rstrip('.')}"]


def _output(old: Json, new: Json) -> list[str]:
    failures: list[str] = []
    was, now_is = _unexplained(old["lossless"]), _unexplained(new["lossless"])
    if was == 0 and now_is is None:
        failures.append("whether its output is the same was not checked any more")
    elif was is not None and now_is is not None and now_is > was:
        failures.append(
            f"{now_is} outputs differ from those without speculation and not at a near-tie; "
            f"in the baseline {was} did"
        )
    before, now = (arm.get("distribution") or {} for arm in (old, new))
    if before.get("passed") and (not now or now["passed"] is False):
        words = now.get("words", "the distribution test was not made any more")
        failures.append(words.rstrip("."))
    return [f"{old['label']}: {failure}" for failure in failures]


def _unexplained(lossless: Json | None) -> int | None:
    if not lossless:
        return None
    return unexplained(lossless)
