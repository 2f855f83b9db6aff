"""What a better draft, another k, another load or a bigger target would bring, from a sweep.

The step times that a sweep measured give a model of a step's cost (`bench.sweep.step_time`),
acceptance gives the number of steps (`bench.sweep.steps`); both together give the speed.
Every answer carries how far the model is off on what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.records.acceptance import Floats
from bench.stats.resample import CONFIDENCE
from bench.sweep.best_k import speedup
from bench.sweep.cells import CellResult, mean_occupancy
from bench.sweep.settings import check_axis
from bench.sweep.step_time import Cost, Setting, StepTime, fit
from bench.sweep.steps import (
    acceptance_length,
    acceptance_of,
    answer_tokens,
    at_k,
    chances,
    drafted_per_step,
    expected_steps,
    graphs_of,
    points,
    seconds_of,
    setting_of,
    source,
    steps_of,
    with_length,
)
from drafts.errors import UserError

LEFT_OUT_AT_LEAST = 3  # foretold settings, to say how far the model may be off


@dataclass(frozen=True)
class Question:
    """What to predict. `ks` and `concurrencies` None are those that were measured.

    A draft's acceptance is its measured one, or that of a draft which accepts `length` tokens a
    step at `length_at_k` (the odds of all positions changed alike), or `conditional` [k].
    `target_scale` multiplies the target's part of a step but for `overhead` seconds of it.
    """

    ks: tuple[int, ...] | None = None
    concurrencies: tuple[int, ...] | None = None
    length: float | None = None
    length_at_k: int | None = None
    conditional: tuple[float, ...] | None = None
    target_scale: float = 1.0
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for option, axis in (("--k", self.ks), ("--concurrency", self.concurrencies)):
            if axis is not None:
                check_axis(option, axis)
        if self.length_at_k is not None:
            check_axis("--at-k", (self.length_at_k,))
        if not 0 < self.target_scale < float("inf"):
            raise UserError(f"the target's scale is {self.target_scale:g}", hint="give more than 0")
        if not 0 <= self.overhead < float("inf"):
            raise UserError(f"the overhead is {self.overhead:g} s", hint="give 0 or more")
        if self.length is not None and self.conditional is not None:
            raise UserError(
                "acceptance is given twice", hint="give --acceptance or --acceptance-length"
            )


@dataclass(frozen=True)
class Prediction:
    """One answer. Times are milliseconds of a step; `measured` is the speedup of the same setting.

    `break_even` is the acceptance length at which speculation costs nothing and gains nothing.
    `beyond` says that a step reads more tokens, or drafts more, than any that was measured. `low`
    and `high` are a 95% interval of the speedup as far as the cost of a step goes: by the errors
    with which the model foretells settings from others; None where it could foretell too few.
    """

    arm: str
    label: str
    k: int
    concurrency: int
    acceptance_length: float
    none_ms: float
    target_ms: float
    draft_ms: float
    speedup: float
    break_even: float
    beyond: bool
    low: float | None = None
    high: float | None = None
    measured: float | None = None

    @property
    def step_ms(self) -> float:
        """The whole step."""
        return self.target_ms + self.draft_ms


@dataclass(frozen=True, eq=False)
class WhatIf:
    """All answers, and the model that they come from."""

    predictions: list[Prediction]
    model: StepTime

    def best(self) -> list[Prediction]:
        """Of each arm and concurrency the k with the highest predicted speedup."""
        groups: dict[tuple[str, int], list[Prediction]] = {}
        for found in self.predictions:
            groups.setdefault((found.arm, found.concurrency), []).append(found)
        return [max(group, key=lambda found: found.speedup) for group in groups.values()]

    def as_json(self, question: Question) -> dict[str, Any]:
        """The content of what_if.json."""
        return {
            "schema": "afaspec-what-if/1",
            "question": asdict(question),
            "fit": fit_summary(self.model),
            "predictions": [{**asdict(p), "step_ms": p.step_ms} for p in self.predictions],
            "best": [{"arm": p.arm, "concurrency": p.concurrency, "k": p.k} for p in self.best()],
        }


def answer(cells: Sequence[CellResult], question: Question, *, arm: str | None = None) -> WhatIf:
    """Fit the cells' step times and predict. The cells share temperature, length and sampling.

    All cells are fitted; `arm` is the one asked about, None for all.

    Raises `UserError` where the cells do not tell the answer, and says which ones would.
    """
    measured = [cell for cell in cells if cell.series is not None]
    if not measured:
        raise UserError("no cell of the sweep could run", hint="see the reasons in its sweep.json")
    model = fit(*points(measured))
    ks = question.ks or tuple(range(1, max(cell.k for cell in measured) + 1))
    loads = question.concurrencies or tuple(sorted({cell.concurrency for cell in measured}))
    told = {(cell.arm, cell.k, cell.concurrency): speedup(cell).value for cell in measured}
    plain = question == Question(question.ks, question.concurrencies)
    names = list(dict.fromkeys(cell.arm for cell in measured))
    if arm is not None and arm not in names:
        raise UserError(
            f"the sweep has no draft {arm!r} that ran", hint=f"give one of {', '.join(names)}"
        )
    most = max(cell.concurrency * (1 + drafted_per_step(cell)) for cell in measured)
    predictions = []
    for name in [arm] if arm is not None else names:
        own = [cell for cell in measured if cell.arm == name]
        for load in loads:
            for k in _within(ks, own[0], asked=question.ks is not None):
                found = _predict(model, own, question, k, load, most)
                seen = told.get((name, k, load)) if plain else None
                predictions.append(replace(found, measured=seen))
    return WhatIf(predictions, model)


@dataclass(frozen=True)
class Check:
    """A measured cell beside its prediction: speedup, tokens per step and milliseconds per step."""

    speedup: float
    predicted_speedup: float
    tokens_per_step: float
    predicted_tokens_per_step: float
    step_ms: float
    predicted_step_ms: float

    @property
    def error(self) -> float:
        """Of the predicted speedup, relative to the measured one."""
        return self.predicted_speedup / self.speedup - 1


def check(model: StepTime, cell: CellResult, acceptance: CellResult) -> Check:
    """Predict a measured cell from a model and another cell's acceptance, on the same prompts.

    Of the cell itself only the lengths of the answers are used: a wave's requests end at different
    steps, so that fewer run than the concurrency says.
    """
    assert cell.series is not None
    assert cell.none is not None
    chance = chances(acceptance, cell.k)
    tokens = [round(mean) for mean in np.mean(cell.none.tokens, axis=0)]
    steps = np.array([expected_steps(*pair) for pair in zip(chance, tokens, strict=False)])
    drafted = drafted_per_step(acceptance) * cell.k / acceptance.k
    setting = setting_of(cell, mean_occupancy(steps, cell.concurrency), cell.k, drafted)
    alone = Setting(mean_occupancy(cell.none.steps, cell.concurrency), graphs=graphs_of(cell))
    none, cost = (step_cost(model, s, Question()).seconds for s in (alone, setting))
    pace = none / (seconds_of(cell.none) / steps_of(cell.none))
    return Check(
        speedup(cell).value,
        float(sum(tokens) * none / (steps.sum() * cost)),
        float(np.sum(cell.series.tokens)) / steps_of(cell.series),
        sum(tokens) / float(steps.sum()),
        1000 * pace * seconds_of(cell.series) / steps_of(cell.series),
        1000 * cost,
    )


def fit_summary(model: StepTime) -> dict[str, Any]:
    """The fitted costs in milliseconds, and how far they are off, relative to what was measured."""
    names = ("fixed", "per_pass", "per_drafted_token")
    costs = 1000 * model.coefficients
    left_out = np.abs(model.left_out[np.isfinite(model.left_out)])
    return {
        "target_ms": {"fixed": float(costs[0]), "per_token": float(costs[1])},
        "drafts_ms": {
            shape: dict(zip(names, map(float, costs[2 + 3 * i : 5 + 3 * i]), strict=True))
            for i, shape in enumerate(model.shapes)
        },
        "settings": len(model.settings),
        "largest_residual": float(np.abs(model.residuals).max()),
        "left_out": len(left_out),
        "left_out_median": float(np.median(left_out)) if len(left_out) else None,
        "left_out_largest": float(left_out.max()) if len(left_out) else None,
    }


def step_cost(model: StepTime, setting: Setting, question: Question) -> Cost:
    """A step's cost with the target's part scaled. `UserError` where the model cannot tell it."""
    if not model.knows(setting, question.target_scale):
        asked = f"{setting.drafted:.3g} drafted tokens at concurrency {setting.requests:g}"
        if question.target_scale != 1:
            asked += f" of a target {question.target_scale:g} times as costly"
        raise UserError(
            f"the {len(model.settings)} measured settings do not tell the cost of a step with "
            f"{asked}",
            hint="run the sweep again into the same folder (finished cells are kept) with two "
            "values of --k far apart, such as 1,3, and, for other loads and targets, two of "
            "--concurrency",
        )
    cost = model.cost(setting)
    scaled = question.overhead + question.target_scale * (cost.target - question.overhead)
    return Cost(max(scaled, 0.0), cost.draft)


def _within(ks: tuple[int, ...], cell: CellResult, *, asked: bool) -> list[int]:
    """The ks that the cell's draft can do; one that was asked for and is not among them raises."""
    limit = cell.draft["max_k"]
    possible = [k for k in ks if limit is None or k <= limit]
    if asked and len(possible) < len(ks):
        raise UserError(
            f"the draft {cell.arm!r} drafts at most {limit} tokens a step, not {max(ks)}",
            hint=f"give --k {limit} or less, or --arm for another draft",
        )
    return possible


def _predict(
    model: StepTime,
    cells: Sequence[CellResult],
    question: Question,
    k: int,
    load: int,
    most: float,
) -> Prediction:
    cell = source(cells, k)
    limit = max(c.k for c in cells)
    chance, tokens = _asked(cells, question, k)
    steps = [expected_steps(row, count) for row, count in zip(chance, tokens, strict=True)]
    setting = setting_of(cell, load, k, drafted_per_step(cell) * k / cell.k)
    none = step_cost(model, Setting(load, graphs=graphs_of(cell)), question)
    cost = step_cost(model, setting, question)
    gain = sum(tokens) * none.seconds / (sum(steps) * cost.seconds)
    factor = _reach(model)
    return Prediction(
        arm=cell.arm,
        label=cell.label,
        k=k,
        concurrency=load,
        acceptance_length=float(np.average(list(map(acceptance_length, chance)), weights=steps)),
        none_ms=1000 * none.seconds,
        target_ms=1000 * cost.target,
        draft_ms=1000 * cost.draft,
        speedup=gain,
        break_even=cost.seconds / none.seconds,
        beyond=bool(setting.tokens > 1.001 * most or k > limit),
        low=gain / factor if factor else None,
        high=gain * factor if factor else None,
    )


def _reach(model: StepTime) -> float | None:
    """By which factor a speedup of two predicted steps may be off, 95%; None where nobody knows."""
    errors = model.left_out[np.isfinite(model.left_out)]
    if len(errors) < LEFT_OUT_AT_LEAST:
        return None
    from scipy.special import stdtrit  # quantiles of Student's t

    spread = math.sqrt(2 * float(np.mean(np.log1p(errors) ** 2)))  # of both steps
    return math.exp(float(stdtrit(len(errors), (1 + CONFIDENCE) / 2)) * spread)


def _asked(cells: Sequence[CellResult], question: Question, k: int) -> tuple[Floats, list[int]]:
    """[P, k] conditional acceptance and [P] tokens: of each prompt, or of one that stands for all
    where the acceptance is asked for and not measured.
    """
    tokens = answer_tokens(source(cells, k))
    if question.conditional is not None:
        asked = np.array(question.conditional)
    elif question.length is not None:
        place = question.length_at_k or max(cell.k for cell in cells)
        pooled = np.nan_to_num(acceptance_of(source(cells, place)).conditional)
        asked = with_length(at_k(pooled, place), question.length)
    else:
        return chances(source(cells, k), k), tokens
    return at_k(asked, k)[None], [round(float(np.mean(tokens)))]
