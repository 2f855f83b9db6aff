"""What a step of the target costs, fitted from measured steps.

Seconds of a step while b requests run, each with d drafted tokens to verify:

    fixed + per token * b * (1 + d)                                     the target, and the engine
    + draft fixed + per pass * (passes - 1) + per drafted token * b * d       where a draft is used

A draft that works token by token makes k passes, one that drafts all tokens at once makes one.
Drafts with layers of the same sizes cost the same and share their three numbers. None of the
numbers is negative; they minimise the squared relative errors. The model is linear in the number
of tokens: a device that turns from memory-bound to compute-bound inside the measured range bends.
Where vLLM replays CUDA graphs, a step costs what the next captured size costs, a staircase:
b * (1 + d) is then that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.records.acceptance import Floats

TARGET_TERMS = 2
DRAFT_TERMS = 3
NOT_SEEN = 0.02  # largest part of a question that no measured setting may speak for
RIDGES = np.geomspace(1e-15, 1.0, 46)
MOST_ERROR = 6.0  # times the error of one measurement: what lies further off is not answered


@dataclass(frozen=True)
class Setting:
    """What a step does. `requests` is a mean and need not be whole; `shape` None is no draft.

    `graphs` are the numbers of tokens for which the engine without a draft has CUDA graphs.
    """

    requests: float
    drafted: float = 0.0
    passes: int = 0
    shape: str | None = None
    graphs: tuple[int, ...] = ()

    @property
    def tokens(self) -> float:
        """Tokens that the target reads in the step."""
        return self.requests * (1 + self.drafted)

    @property
    def computed(self) -> float:
        """Tokens that it computes: filled up to the next graph, and none is filled beyond the last.

        As vLLM does for k drafted tokens, the sizes are multiples of k + 1. Between two whole
        numbers of requests the mean lies between theirs.
        """
        if not self.graphs:
            return self.tokens
        each = 1 + math.ceil(self.drafted)
        raised = sorted({each * math.ceil(size / each) for size in self.graphs})
        sizes = [size for size in raised if size <= max(self.graphs)]
        low = math.floor(self.requests)
        ends = [
            next((float(size) for size in sizes if size >= tokens), tokens)
            for tokens in (count * (1 + self.drafted) for count in (low, low + 1))
        ]
        return ends[0] + (self.requests - low) * (ends[1] - ends[0]) if low else ends[1]


@dataclass(frozen=True)
class Cost:
    """Seconds of one step: the target's part, and the draft's."""

    target: float
    draft: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.target + self.draft


@dataclass(frozen=True, eq=False)
class StepTime:
    """A fitted model. `residuals` and `left_out` are relative errors, one per fitted setting.

    `left_out` predicts each setting from the others; NaN where the others cannot tell.
    """

    shapes: tuple[str, ...]
    coefficients: Floats
    settings: tuple[Setting, ...]
    seconds: Floats
    residuals: Floats
    left_out: Floats

    def knows(self, setting: Setting, target_scale: float = 1.0) -> bool:
        """Whether the fitted settings determine this one's cost, the target's part scaled."""
        if setting.shape not in (None, *self.shapes):
            return False
        row = _row(setting, self.shapes)
        row[:TARGET_TERMS] *= target_scale
        rows = np.array([_row(s, self.shapes) for s in self.settings])
        return _is_determined(rows, self.seconds, row, float(row @ self.coefficients))

    def cost(self, setting: Setting) -> Cost:
        """Seconds of a step in this setting."""
        parts = _row(setting, self.shapes) * self.coefficients
        return Cost(float(parts[:TARGET_TERMS].sum()), float(parts[TARGET_TERMS:].sum()))


def fit(settings: Sequence[Setting], seconds: Sequence[float]) -> StepTime:
    """Fit the model to measured seconds per step, and test it by leaving each setting out."""
    shapes = tuple(dict.fromkeys(s.shape for s in settings if s.shape is not None))
    rows = np.array([_row(setting, shapes) for setting in settings])
    times = np.asarray(seconds, dtype=np.float64)
    coefficients = _solve(rows, times)
    left_out = np.full(len(times), np.nan)
    for i in range(len(times)):
        others = np.arange(len(times)) != i
        if others.any() and _is_determined(rows[others], times[others], rows[i], times[i]):
            left_out[i] = rows[i] @ _solve(rows[others], times[others]) / times[i] - 1
    residuals = rows @ coefficients / times - 1
    return StepTime(shapes, coefficients, tuple(settings), times, residuals, left_out)


def _row(setting: Setting, shapes: Sequence[str]) -> Floats:
    row = np.zeros(TARGET_TERMS + DRAFT_TERMS * len(shapes))
    row[:TARGET_TERMS] = 1.0, setting.computed
    if setting.shape in shapes:
        start = TARGET_TERMS + DRAFT_TERMS * shapes.index(setting.shape)
        row[start : start + DRAFT_TERMS] = (
            1.0,
            setting.passes - 1,
            setting.requests * setting.drafted,
        )
    return row


def _solve(rows: Floats, times: Floats) -> Floats:
    """Non-negative least squares on relative errors."""
    from scipy.optimize import nnls

    return np.asarray(nnls(rows / times[:, None], np.ones(len(times)))[0])


def _is_determined(rows: Floats, times: Floats, row: Floats, time: float) -> bool:
    """Whether the times of `rows` tell that of `row` (about `time`).

    It must be a combination of them, and one that does not multiply their errors.
    """
    scale = np.abs(rows).max(axis=0)
    if (row[scale == 0] != 0).any():
        return False
    used = scale > 0
    known, asked = rows[:, used] / scale[used] * (time / times)[:, None], row[used] / scale[used]
    u, singular, v = np.linalg.svd(known.T, full_matrices=False)
    for ridge in RIDGES:  # the larger, the smaller the weights and the more is left unsaid
        weights = v.T @ (singular / (singular**2 + ridge) * (u.T @ asked))
        if np.linalg.norm(weights) <= MOST_ERROR:
            missing = np.abs(known.T @ weights - asked).max()
            return bool(missing <= NOT_SEEN * np.abs(asked).max())
    return False
