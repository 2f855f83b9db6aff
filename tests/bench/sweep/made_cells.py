"""A sweep's cells made from a known step cost and known acceptance, so that truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.records.run import Series
from bench.sweep.cells import CellResult, write_cell

EAGLE = {"sha256": "1" * 64, "family": "eagle3", "shape": "e", "one_pass": False, "max_k": None}
CHANCES = (0.75, 0.7, 0.65, 0.62, 0.6)  # conditional acceptance of the draft, by position
BETTER = (0.9, 0.88, 0.85, 0.83, 0.8)
TOKENS, PROMPTS, ROUNDS = 96, 16, 3


@dataclass(frozen=True)
class Truth:
    """Seconds of a step, as `bench.sweep.step_time` describes it."""

    fixed: float = 7e-3
    per_token: float = 4e-4
    draft_fixed: float = 2e-3
    per_pass: float = 1.5e-3
    per_drafted_token: float = 1e-4
    noise: float = 0.005

    def step(self, running: int, k: int = 0) -> float:
        """One step with `running` requests of k drafted tokens each."""
        seconds = self.fixed + self.per_token * running * (1 + k)
        if k:
            seconds += self.draft_fixed + self.per_pass * (k - 1)
            seconds += self.per_drafted_token * running * k
        return seconds


def make_cell(
    k: int,
    concurrency: int,
    truth: Truth = Truth(),
    *,
    arm: str = "base",
    chances: tuple[float, ...] = CHANCES,
    draft: dict[str, Any] | None = None,
    seed: int = 0,
) -> CellResult:
    """A cell as a sweep would have measured it, step by step."""
    generator = np.random.default_rng([seed, k, concurrency, len(arm)])
    return CellResult(
        arm=arm,
        label=arm,
        k=k,
        sample_method="greedy",
        temperature=0.0,
        concurrency=concurrency,
        max_tokens=TOKENS + 1,
        draft=draft or EAGLE,
        none=_series(0, concurrency, truth, (), generator),
        series=_series(k, concurrency, truth, chances, generator),
    )


def make_sweep(folder: Path, ks: tuple[int, ...], loads: tuple[int, ...], **options: Any) -> Path:
    """A sweep's folder with a cell file for every k and concurrency."""
    for k in ks:
        for load in loads:
            cell = make_cell(k, load, **options)
            write_cell(folder / "cells" / f"{cell.arm}-k{k}-c{load}.json", cell)
    return folder


def _series(
    k: int, load: int, truth: Truth, chances: tuple[float, ...], generator: np.random.Generator
) -> Series:
    series = Series([[] for _ in range(ROUNDS)], [[] for _ in range(ROUNDS)])
    for name in ("wave_seconds", "drafts", "drafted", "accepted"):
        setattr(series, name, [[] for _ in range(ROUNDS)])
    for r in range(ROUNDS):
        for _ in range(PROMPTS // load):
            left, ends, now = [TOKENS] * load, [0.0] * load, 0.0
            drafts, accepted = [0] * load, [[0] * k for _ in range(load)]
            while any(count > 0 for count in left):
                running = [i for i in range(load) if left[i] > 0]
                now += truth.step(len(running), k) * generator.normal(1, truth.noise)
                for i in running:
                    kept = 0
                    while kept < k and generator.random() < chances[kept]:
                        accepted[i][kept] += 1
                        kept += 1
                    drafts[i] += bool(k)
                    left[i], ends[i] = left[i] - kept - 1, now
            series.tokens[r] += [TOKENS] * load
            series.seconds[r] += ends
            series.wave_seconds[r].append(now)
            series.drafts[r] += drafts
            series.drafted[r] += [k * count for count in drafts]
            series.accepted[r] += accepted
    return series
