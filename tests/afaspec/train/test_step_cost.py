"""The side-by-side timing runs both arms on the same data and gives an interval."""

from __future__ import annotations

from pathlib import Path

from afaspec.train.step_cost import relative_cost
from drafts.registry import read_draft
from drafts.target import read_target


def test_both_arms_are_timed(tiny_target: Path, tiny_draft: Path) -> None:
    cost = relative_cost(read_draft(tiny_draft), read_target(tiny_target), (12, 20), pairs=4)
    assert 0 < cost.low <= cost.value <= cost.high
