"""The side-by-side timing runs both arms on the same batches and gives an interval."""

from __future__ import annotations

from pathlib import Path

from afaspec.train.step_cost import step_cost
from tests.tiny_store import write_store


def test_both_arms_are_timed(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", tiny_target, tiny_draft)
    cost = step_cost(store, tiny_draft, tiny_target, pairs=4)
    assert 0 < cost.low <= cost.value <= cost.high
