"""Annealing: beta never rises, ends at exactly 0, and follows the optimizer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from afaspec.adapters.annealing import AnnealedLora, Annealer
from afaspec.adapters.schedule import AnnealingSchedule

SCHEDULES = [
    {"shape": shape, **times}
    for shape in ("linear", "cosine", "exponential", "step")
    for times in (
        {},
        {"end": 1.0},
        {"start": 0.2, "end": 0.6},
        {"start": 10, "hold": 5, "end": 40},
        {"hold": 0.3, "end": 0.3},
        {"end": 1000},
    )
]


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_beta_never_rises_and_ends_at_zero(settings: dict[str, Any], total: int) -> None:
    schedule = AnnealingSchedule(**settings)
    betas = [schedule.beta(step, total) for step in range(total + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(betas))
    assert all(0.0 <= beta <= 1.0 for beta in betas)
    assert betas[-1] == 0.0
    assert betas[total - 1] == 0.0  # the last optimizer step trains what will be merged


def test_hold_and_end_are_where_they_say() -> None:
    schedule = AnnealingSchedule(shape="linear", start=10, hold=10, end=60)
    assert schedule.beta(20, 100) == 1.0
    assert schedule.beta(21, 100) < 1.0
    assert schedule.beta(40, 100) == pytest.approx(0.5)
    assert schedule.beta(59, 100) > 0.0
    assert schedule.beta(60, 100) == 0.0


def test_fractions_are_of_the_run() -> None:
    schedule = AnnealingSchedule(shape="cosine", start=0.1, end=0.5)
    assert schedule.beta(10, 100) == 1.0
    assert schedule.beta(30, 100) == pytest.approx(0.5)
    assert schedule.beta(50, 100) == 0.0


def test_stairs_have_that_many_levels() -> None:
    schedule = AnnealingSchedule(shape="step", end=1.0, stairs=4)
    assert len({schedule.beta(step, 1001) for step in range(1001)}) == 5  # four, and 0


def test_annealing_that_begins_after_its_end_is_refused() -> None:
    with pytest.raises(ValidationError, match="begin before it ends"):
        AnnealingSchedule(start=0.5, hold=0.2, end=0.6)


def test_annealer_follows_the_optimizer_and_resumes() -> None:
    layers = [AnnealedLora("relu"), AnnealedLora("relu")]
    schedule = AnnealingSchedule(shape="linear", end=8)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    annealer = Annealer(layers, schedule, 10)
    annealer.attach(optimizer)
    seen = []
    for _ in range(5):
        seen.append(layers[1].beta)
        weight.sum().backward()
        optimizer.step()
    assert seen == [schedule.beta(step, 10) for step in range(5)]

    resumed = Annealer([AnnealedLora("relu")], schedule, 10)
    resumed.load_state_dict(annealer.state_dict())
    assert resumed.layers[0].beta == annealer.beta == schedule.beta(5, 10)
    assert resumed.state_dict() == annealer.state_dict()
