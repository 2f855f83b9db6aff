"""What a run writes while it trains: metrics.jsonl and TensorBoard's events say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from afaspec.train.config import TrainConfig
from tests.opened import train
from tests.tiny.store import write_store


class StoppedError(Exception):
    pass


def stop_at(step: int) -> Any:
    def report(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise StoppedError

    return report


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def test_tensorboard_has_every_metric_once_after_a_resume(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    config = TrainConfig(
        store=write_store(tmp_path / "store", tiny_target, tiny_draft, prompts=8),
        draft=tiny_draft,
        out=tmp_path / "run",
        arm="afa-lora",
        steps=6,
        eval_every=2,
        checkpoint_every=2,
        batch_size=2,
        rank=2,
        compiled=False,
    )
    with pytest.raises(StoppedError):
        train(config, stop_at(5))  # a step past the checkpoint that it resumes from
    train(config)
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    written = events(config.out)
    assert set(written) == {"loss", "lr", "grad_norm", "beta", "acceptance_length"}
    for tag, points in written.items():
        expected = [(row["step"], row[tag]) for row in rows if tag in row]
        assert [step for step, _ in points] == [step for step, _ in expected]
        assert [value for _, value in points] == pytest.approx([value for _, value in expected])
