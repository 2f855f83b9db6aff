"""Is one arm different from another? Paired comparisons, with a verdict only where it is earned.

The sample is the prompts: what holds for them should hold for others like them. Rounds repeat the
prompts. Greedy rounds repeat the same tokens, so for acceptance they add nothing, and for speed
they add a second source of chance, the machine: whatever slows it for a while slows a whole block
(the prompts that an arm runs in one go) and not one prompt. So the variance of a difference is
taken over prompts (each with all its rounds) and over blocks, see `bench.stats.intervals`.
Two or three rounds are too few to be resampled, but they hold many blocks. What slows both arms
cancels, because a difference is taken cell by cell; and since the order of the arms is drawn anew
for every block, what slows one of them cannot favour it block after block.

Every comparison has its own 95% interval. Of several comparisons of one metric in a run, one in
twenty would be "different" by chance, so the verdict also asks Holm's correction over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from bench.records.arms import LABELS
from bench.records.speeds import RATES, SPEEDUPS
from bench.stats.intervals import Accounts, Floats, Quotient, beyond, clustered, p_value, student
from bench.stats.resample import CONFIDENCE, Figure

ACCEPTANCE = "acceptance_length"
NO_DIFFERENCE = "no difference shown"
# A run has one training of each: what it finds is of drafts, not of methods.
PHRASES = {
    "none": "no speculation",
    "ngram": "the n-gram draft",
    "base": "the base draft",
    "lora": "the LoRA draft",
    "afa-lora": "the AFA-LoRA draft",
    "full": "the fully fine-tuned draft",
}


@dataclass(frozen=True)
class Comparison:
    """`arm` beside `against`, on one metric, with 95% intervals.

    `difference` is in the metric's unit, `relative` is `arm` / `against` - 1. `p_value` and the
    verdict belong to the difference for acceptance length, and to the quotient for anything else.
    `p_holm` is corrected for the `among` comparisons of this metric that were made together.
    """

    arm: str
    against: str
    metric: str
    difference: Figure
    relative: Figure
    p_value: float
    p_holm: float
    among: int = 1

    @property
    def verdict(self) -> str:
        """`higher`, `lower` or `no difference shown`."""
        if not self.p_holm < 1 - CONFIDENCE:
            return NO_DIFFERENCE
        return "higher" if self.difference.value > 0 else "lower"

    @property
    def words(self) -> str:
        """The verdict as a sentence, with the interval that it stands on."""
        return _words(self)

    def as_json(self) -> dict[str, Any]:
        """The entry of report.json's `comparisons`."""
        return {
            **vars(self),
            "difference": self.difference.as_json(),
            "relative": self.relative.as_json(),
            "verdict": self.verdict,
            "words": self.words,
        }


def compare(
    arm: str,
    against: str,
    metric: str,
    first: Quotient,
    second: Quotient,
    per_block: int = 1,
    prompts: Sequence[int] | None = None,
) -> Comparison:
    """Compare two arms whose tables [rounds, units] hold the same units in the same order.

    A unit is a request, or a block of requests that ran at once. `prompts` numbers each unit's
    prompt from 0, where several units (the turns of a conversation) share one; `per_block`
    prompts make a block.
    """
    units = first.over.shape[1]
    unit = np.arange(units) if prompts is None else np.asarray(prompts)

    def accounts(weight: float, other: float) -> Accounts:
        influence = weight * first.influence - other * second.influence
        return paired_accounts(influence, metric, unit, per_block)

    return contrast(arm, against, metric, first.value, second.value, accounts)


def paired_accounts(influence: Floats, metric: str, unit: np.ndarray, per_block: int) -> Accounts:
    """The chance in a difference [rounds, units] that was taken cell by cell.

    `unit` numbers each column's prompt from 0; `per_block` prompts make a block.
    """
    blocks = int(unit.max()) // per_block + 1
    block = unit // per_block + np.arange(len(influence))[:, None] * blocks
    by_prompt, by_block = clustered(influence, unit), clustered(influence, block)
    if by_prompt is None:
        return []
    if metric == ACCEPTANCE:  # which knows no clock
        return [[by_prompt]]
    if by_block is None:  # whatever the machine did meanwhile is the difference, or none of it
        return []
    both = [by_prompt, *beyond(by_block, float((influence**2).sum()))]
    return [both, [by_block]]  # there may be fewer blocks than prompts


def contrast(
    arm: str,
    against: str,
    metric: str,
    first: float,
    second: float,
    accounts: Callable[[float, float], Accounts],
) -> Comparison:
    """A comparison of two values; `accounts(u, v)` are of the chance in u x first - v x second."""
    difference, scatter = first - second, accounts(1.0, 1.0)
    ratio, of_ratio = float("nan"), cast(Accounts, [])
    if first > 0 and second > 0:
        ratio, of_ratio = float(np.log(first / second)), accounts(1 / first, 1 / second)
    logs = student(ratio, of_ratio)
    judged = (difference, scatter) if metric == ACCEPTANCE else (ratio, of_ratio)
    chance = p_value(*judged)
    return Comparison(
        arm=arm,
        against=against,
        metric=metric,
        difference=student(difference, scatter),
        relative=Figure(*(float(np.expm1(end)) for end in (logs.value, logs.low, logs.high))),
        p_value=chance,
        p_holm=chance,
    )


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction within each metric, in the order given."""
    corrected = list(comparisons)
    for metric in {comparison.metric for comparison in comparisons}:
        places = [i for i, found in enumerate(comparisons) if found.metric == metric]
        places.sort(key=lambda i: comparisons[i].p_value)
        running = 0.0
        for rank, place in enumerate(places):
            running = max(running, min(1.0, (len(places) - rank) * comparisons[place].p_value))
            corrected[place] = replace(comparisons[place], p_holm=running, among=len(places))
    return corrected


def _words(found: Comparison) -> str:
    arm, against = _phrase(found.arm), _phrase(found.against)
    sign = 1.0 if found.difference.value > 0 else -1.0
    if found.verdict == NO_DIFFERENCE:
        text = f"no difference in {_metric(found.metric)} shown between {arm} and {against}"
        text += f" ({_span(found, 1.0)})"
        if found.p_value < 1 - CONFIDENCE:
            text += f", as chance may give this among {found.among} comparisons"
    elif found.metric == ACCEPTANCE:
        text = f"{arm} accepts {abs(found.difference.value):.2f} tokens per step "
        text += f"{'more' if sign > 0 else 'fewer'} than {against} ({_span(found, sign)})"
    elif found.metric in SPEEDUPS:
        times = f"{1 + found.relative.value:.2f}"
        text = SPEEDUPS[found.metric].times.format(arm=arm, against=against, times=times)
        text += f" ({_span(found, 1.0)})"
    elif found.metric in RATES:
        text = RATES[found.metric].more.format(
            arm=arm,
            against=against,
            share=_percent(abs(found.relative.value)),
            faster="faster" if sign > 0 else "slower",
            higher="higher" if sign > 0 else "lower",
        )
        text += f" ({_span(found, sign)})"
    else:
        text = f"{arm}: {_metric(found.metric)} {_percent(abs(found.relative.value))} "
        text += f"{found.verdict} than with {against} ({_span(found, sign)})"
    return text[0].upper() + text[1:] if found.arm in PHRASES or text.startswith("no ") else text


def _span(found: Comparison, sign: float) -> str:
    """The interval, lower end first, in the terms of the sentence."""
    figure = found.difference if found.metric == ACCEPTANCE else found.relative
    ends = sorted((sign * figure.low, sign * figure.high))
    if np.isnan(ends).any():
        return "too few prompts or blocks for an interval"
    if found.metric == ACCEPTANCE:
        return _between(ends, 0.0, 2)
    if found.metric in SPEEDUPS:
        return _between([1 + end for end in ends], 1.0, 2)
    return _between([100 * end for end in ends], 0.0, 1, "%")


def _between(ends: Sequence[float], nothing: float, digits: int, unit: str = "") -> str:
    """Both ends, with enough decimals to tell on which side of `nothing` each lies."""
    while digits < 5 and any(round(end, digits) == nothing != end for end in ends):
        digits += 1
    return " to ".join(f"{end:.{digits}f}{unit}" for end in ends)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _phrase(name: str) -> str:
    return PHRASES.get(name, LABELS.get(name, name))


def _metric(name: str) -> str:
    speed = RATES.get(name) or SPEEDUPS.get(name)
    return speed.noun if speed else name.replace("_", " ")
