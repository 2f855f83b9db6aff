"""From a sweep's cells to what a model of their cost needs: settings, step times and acceptance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.records.acceptance import Acceptance, Floats
from bench.records.run import Series
from bench.sweep.cells import CellResult, mean_occupancy
from bench.sweep.expected_steps import per_prompt
from bench.sweep.step_time import Setting


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
        settings.append(Setting(mean_occupancy(tokens, load)))
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
    return Setting(requests, drafted, 1 if cell.draft["one_pass"] else k, cell.draft["shape"])


def seconds_of(series: Series) -> float:
    """Decode seconds of all requests."""
    return float(np.sum(series.seconds))


def steps_of(series: Series) -> float:
    """Steps of all requests."""
    return float(series.steps.sum())
