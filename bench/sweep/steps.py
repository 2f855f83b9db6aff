"""Steps of the target: how many an answer takes by acceptance, and what a sweep measured of them.

A draft is described by its conditional acceptance: the chance that token i is accepted where the
one before it was. Steps are taken as independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.records.acceptance import Acceptance, Floats
from bench.records.run import Series
from bench.sweep.cells import PLAIN_GRAPHS, CellResult, mean_occupancy
from bench.sweep.step_time import Setting
from drafts.errors import UserError


def acceptance_length(conditional: Floats) -> float:
    """Tokens a step yields on average: 1 + accepted tokens, from [k] conditional acceptance."""
    return float(1 + np.cumprod(conditional).sum())


def expected_steps(conditional: Floats, tokens: int) -> float:
    """Steps until `tokens` are there, what the last step yields beyond them being cut off.

    N(t) = 1 + sum over x of P(a step yields x) N(t - x), with N = 0 where nothing is left.
    """
    k = len(conditional)
    reached = np.concatenate([[1.0], np.cumprod(conditional), [0.0]])
    yields = reached[:-1] - reached[1:]  # P(a step yields 1, ..., k + 1 tokens)
    steps = np.zeros(tokens + k + 1)  # N(t) at index t + k
    for t in range(1, tokens + 1):
        before = steps[t - 1 : t + k][::-1]  # N(t - 1), ..., N(t - k - 1)
        steps[t + k] = 1 + yields @ before
    return float(steps[-1])


def at_k(conditional: Floats, k: int) -> Floats:
    """The draft's conditional acceptance at another k.

    A smaller k is a beginning of what was measured. Beyond it every further position falls by the
    factor that the measured ones fell by on average, and never rises.
    """
    if k <= len(conditional):
        return conditional[:k]
    fall = 1.0
    if len(conditional) > 1 and conditional[0] > 0:
        fall = min(1.0, float(conditional[-1] / conditional[0]) ** (1 / (len(conditional) - 1)))
    further = conditional[-1] * fall ** np.arange(1, k - len(conditional) + 1)
    return np.concatenate([conditional, further])


def per_prompt(acceptance: Acceptance, k: int) -> Floats:
    """[P, k]: each prompt's conditional acceptance at `k`.

    Where a prompt never came to a position, and beyond the measured ones, all prompts' holds.
    """
    pooled = np.nan_to_num(acceptance.conditional)
    accepted = acceptance.accepted_per_prompt[:, :k]
    before = np.concatenate([acceptance.drafts_per_prompt[:, None], accepted[:, :-1]], axis=1)
    whole = np.tile(at_k(pooled, k), (len(accepted), 1))
    known = before > 0
    whole[:, : accepted.shape[1]][known] = accepted[known] / before[known]
    return whole


def with_length(conditional: Floats, length: float) -> Floats:
    """The conditional acceptance of a better or worse draft, whose acceptance length is `length`.

    The odds of every position change by one factor. Raises `UserError` for what k cannot give.
    """
    k = len(conditional)
    if not 1 < length < k + 1:
        raise UserError(
            f"an acceptance length of {length:g} is not possible at k = {k}",
            hint=f"give more than 1 and less than {k + 1}, or another --at-k",
        )
    inside = np.clip(conditional, 1e-6, 1 - 1e-6)
    odds = inside / (1 - inside)
    low, high = -40.0, 40.0
    for _ in range(100):  # halve the range of the factor's logarithm
        middle = (low + high) / 2
        changed = odds * np.exp(middle)
        if acceptance_length(changed / (1 + changed)) < length:
            low = middle
        else:
            high = middle
    return changed / (1 + changed)


def from_per_position(per_position: Sequence[float]) -> Floats:
    """Conditional acceptance from the share of drafts accepted up to each position."""
    shares = np.asarray(per_position, dtype=np.float64)
    chain = np.concatenate([[1.0], shares])
    if len(shares) == 0 or not (np.diff(chain) <= 0).all() or not (shares > 0).all():
        raise UserError(
            f"these are no acceptances by position: {', '.join(f'{p:g}' for p in per_position)}",
            hint="give shares above 0 and up to 1, none above the one before: 0.73,0.52,0.36",
        )
    return shares / chain[:-1]


def points(cells: Sequence[CellResult]) -> tuple[list[Setting], list[float]]:
    """Settings and seconds per step to fit: one per cell, and one without a draft per concurrency.

    A cell's time is scaled by how much slower or faster than usual the target alone was beside it.
    """
    settings, seconds = [], []
    for load in sorted({cell.concurrency for cell in cells}):
        here = [cell for cell in cells if cell.concurrency == load]
        plain = {str(c.none.seconds): c.none for c in here if c.none is not None}
        usual = sum(seconds_of(s) for s in plain.values()) / sum(
            steps_of(s) for s in plain.values()
        )
        tokens = np.concatenate([none.steps for none in plain.values()])
        settings.append(Setting(mean_occupancy(tokens, load), graphs=graphs_of(here[0])))
        seconds.append(usual)
        for cell in here:
            assert cell.series is not None
            assert cell.none is not None
            running = mean_occupancy(cell.series.steps, load)
            settings.append(setting_of(cell, running, cell.k, drafted_per_step(cell)))
            pace = usual / (seconds_of(cell.none) / steps_of(cell.none))
            seconds.append(pace * seconds_of(cell.series) / steps_of(cell.series))
    return settings, seconds


def source(cells: Sequence[CellResult], k: int) -> CellResult:
    """The cell whose acceptance tells that at `k`: of the next k measured, at the lowest load."""
    above = [cell.k for cell in cells if cell.k >= k]
    wanted = min(above) if above else max(cell.k for cell in cells)
    return min((c for c in cells if c.k == wanted), key=lambda c: c.concurrency)


def chances(cell: CellResult, k: int) -> Floats:
    """[P, k]: conditional acceptance per prompt."""
    return per_prompt(acceptance_of(cell), k)


def answer_tokens(cell: CellResult) -> list[int]:
    """[P]: tokens of each prompt's answer after its first, the mean over rounds."""
    assert cell.series is not None
    return [round(mean) for mean in np.mean(cell.series.tokens, axis=0)]


def acceptance_of(cell: CellResult) -> Acceptance:
    """Counts per prompt over all rounds, a step without a draft being one not accepted."""
    assert cell.series is not None
    return Acceptance(cell.series.steps.sum(axis=0), np.array(cell.series.accepted).sum(axis=0))


def drafted_per_step(cell: CellResult) -> float:
    """Drafted tokens per step: k, or less where the draft had nothing to propose."""
    assert cell.series is not None
    return float(np.sum(cell.series.drafted)) / steps_of(cell.series)


def setting_of(cell: CellResult, requests: float, k: int, drafted: float) -> Setting:
    """The step of a cell's draft at another load or k."""
    passes = 1 if cell.draft["one_pass"] else k
    return Setting(requests, drafted, passes, cell.draft["shape"], graphs_of(cell))


def graphs_of(cell: CellResult) -> tuple[int, ...]:
    """The sizes of the CUDA graphs of the engine without a draft; none where it has none."""
    return tuple(cell.engine.get(PLAIN_GRAPHS) or ())


def seconds_of(series: Series) -> float:
    """Decode seconds of all requests."""
    return float(np.sum(series.seconds))


def steps_of(series: Series) -> float:
    """Steps of all requests."""
    return float(series.steps.sum())
