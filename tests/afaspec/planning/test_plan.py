"""Plans: small runs that are timed, and what follows from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afaspec.planning import estimate as planning
from afaspec.planning.config import PlanConfig
from afaspec.planning.estimate import from_samples
from afaspec.planning.samples import BenchSample, CaptureSample, TrainSample
from afaspec.store.read import FeatureStore
from drafts.registry import read_draft
from tests.command import run_command
from tests.tiny.store import write_store

CAPTURE = CaptureSample(start=5, work=30, prompts=10, tokens=900, store_bytes=4000, memory=7)
TRAINING = TrainSample(start=8, step=0.5, held_out=0.25, memory=9)
BENCH = BenchSample(start=60, plain=100, drafted=150, memory=10)


def plan_config(tmp_path: Path, draft: Path, **changes: Any) -> PlanConfig:
    given = {"target": "t", "prompts": "p", "draft": str(draft), "out": tmp_path / "plan"}
    return PlanConfig.model_validate(given | changes)


def test_stages_grow_with_what_is_asked_for(tmp_path: Path, tiny_draft: Path) -> None:
    config = plan_config(
        tmp_path, tiny_draft, steps=100, eval_every=50, bench_prompts=50, rounds=2, bench_tokens=90,
        price=3.0, tokens_per_day=1e6,
    )  # fmt: skip
    found = from_samples(config, 200, CAPTURE, TRAINING, BENCH, read_draft(tiny_draft))
    seconds = {stage.name: stage.seconds for stage in found.stages}
    assert seconds == {
        "capture": 5 + 20 * 30,
        "train": pytest.approx(8 + 100 * 0.5 + 3 * 20 * 0.25),
        "bench": pytest.approx(1.5 * 60 + 9000 * (1 / 100 + 2 / 150)),
    }
    assert found.stages[0].disk == 80_000
    assert found.cost == pytest.approx(3 * sum(seconds.values()) / 3600)
    # Twice as fast saves half of the 10,000 seconds that a day's tokens take.
    assert found.payback[2.0] == pytest.approx(sum(seconds.values()) / 5000)
    assert found.payback[1.2] > found.payback[1.5] > found.payback[2.0]
    assert not found.advice
    faster = config.model_copy(update={"serving_rate": 1000.0, "price": None})
    again = from_samples(faster, 200, CAPTURE, TRAINING, BENCH, read_draft(tiny_draft))
    assert again.cost is None
    assert again.payback[2.0] == pytest.approx(10 * found.payback[2.0])


def test_it_says_what_to_change_where_something_does_not_fit(
    tmp_path: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=40_000))
    monkeypatch.setattr(planning, "free_memory", lambda device: 8)
    config = plan_config(tmp_path, tiny_draft, bench_prompts=0)
    found = from_samples(config, 200, CAPTURE, TRAINING, None, read_draft(tiny_draft))
    disk, memory = found.advice
    assert "--limit 100" in disk
    assert "--features int8" in disk
    assert memory.startswith("train holds 9 B, 8 B are free")
    assert "--gradient-checkpointing" in memory
    assert not found.payback


def test_small_runs_foretell_the_store(
    tmp_path: Path, tiny_target: Path, tiny_draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, store = tmp_path / "plan", write_store(tmp_path / "store", tiny_target, tiny_draft, 60)
    given: list[object] = [tiny_target, store.with_suffix(".jsonl"), "--draft", tiny_draft]
    given += ["--out", out, "--sample", 24, "--max-new-tokens", 20, "--device", "cpu", "--price", 2]
    code, error = run_command("plan", *given, "--steps", 40, "--rank", 4, "--bench-prompts", 0)
    assert code == 0, error
    printed = capsys.readouterr().out
    assert "capture" in printed
    assert "At 2 an hour that is" in printed
    assert [path.name for path in out.iterdir()] == ["plan.json"]
    found = json.loads((out / "plan.json").read_text())
    captured, trained = found["stages"]
    for stage in (captured, trained):
        assert stage["seconds"] > 0
        assert stage["memory"] > 1 << 20
    whole = sum(shard.bytes for shard in FeatureStore.open(store).manifest.shards)
    assert captured["disk"] == pytest.approx(whole, rel=0.15)
