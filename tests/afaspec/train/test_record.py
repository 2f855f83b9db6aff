"""A run goes on wherever it and its inputs lie, longer if asked, and never as another run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afaspec.checkpoints.merge import recorded_draft, recorded_target
from afaspec.store.write import locked
from afaspec.train.arm import learning_rate
from afaspec.train.config import TrainConfig
from drafts.errors import UserError
from tests.opened import merge, train
from tests.tiny.store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    folder = tmp_path_factory.mktemp("record") / "store"
    return write_store(folder, tiny_target, tiny_draft, prompts=12)


def config(store: Path, draft: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": 6, "eval_every": 2, "checkpoint_every": 2, "batch_size": 4, "rank": 4,
        "precision": "fp32", "compiled": False, "tensorboard": False, "learning_rate": 0.01,
    }  # fmt: skip
    return TrainConfig(store=store, draft=draft, out=out, **(settings | changes))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class StopNowError(Exception):
    pass


def stop_at(step: int) -> Any:
    def report(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise StopNowError

    return report


def test_a_moved_run_goes_on_from_elsewhere(
    store: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with relative paths; run, store and draft are moved; it goes on, and is merged."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(store, here / "store")
    shutil.copytree(tiny_draft, here / "draft")
    whole = train(config(store, tiny_draft, tmp_path / "whole"))
    monkeypatch.chdir(here)
    with pytest.raises(StopNowError):
        train(config(Path("store"), Path("draft"), Path("run")), stop_at(5))
    recorded = json.loads(Path("run/config.json").read_text())
    assert recorded["store"] == str(here / "store")
    assert recorded["draft"] == str(here / "draft")
    here.rename(there)
    monkeypatch.chdir(tmp_path)
    moved = train(config(Path("there/store"), Path("there/draft"), there / "run"))
    one, two = (load_file(of.result / "adapter_model.safetensors") for of in (whole, moved))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert recorded_draft(moved.folder).folder == there / "draft"
    target = recorded_target(moved.folder)
    assert target is not None
    assert target.folder.is_absolute()
    merge(moved.folder, None, tmp_path / "merged")


def test_what_is_not_trained_may_change(store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    settings = config(store, tiny_draft, tmp_path / "run")
    with pytest.raises(StopNowError):
        train(settings, stop_at(3))
    train(config(store, tiny_draft, tmp_path / "run", eval_every=3, checkpoint_every=1, chunk=64))
    evaluated = [row["step"] for row in rows(settings.out) if "acceptance_length" in row]
    assert evaluated == [0, 2, 3, 6]


def test_what_is_trained_may_not(store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    with pytest.raises(StopNowError):
        train(config(store, tiny_draft, tmp_path / "run"), stop_at(3))
    before = (tmp_path / "run" / "config.json").read_bytes()
    changes: dict[str, tuple[Any, str]] = {
        "learning_rate": (0.02, r"learning_rate \(0.01, now 0.02\)"),
        "batch_size": (3, r"batch_size \(4, now 3\)"),
        "seed": (7, r"seed \(0, now 7\)"),
        "eval_fraction": (0.3, "held-out part"),
    }
    for name, (value, said) in changes.items():
        with pytest.raises(UserError, match=f"another .*{said}"):
            train(config(store, tiny_draft, tmp_path / "run", **{name: value}))
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("stopped", [4, 6])
def test_a_run_is_prolonged(stopped: int, store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    """From the middle of its annealing, and when it was finished; the rate follows the longer."""
    out = tmp_path / "run"
    settings = {"arm": "afa-lora", "annealing": {"end": 0.9}}
    short = config(store, tiny_draft, out, **settings)
    if stopped == 6:
        assert not train(short).before
        assert train(short).before
    else:
        with pytest.raises(StopNowError):
            train(short, stop_at(5))
    longer = config(store, tiny_draft, out, **settings, steps=12)
    assert not train(longer).before
    assert train(longer).before
    found = rows(out)
    assert [row["step"] for row in found] == list(range(13))
    betas = [row["beta"] for row in found[1:]]
    assert betas == sorted(betas, reverse=True)
    assert betas[-1] == 0.0
    if stopped == 4:  # waits where it was, then comes down with the longer schedule
        assert betas[4] == betas[5] == betas[6] > betas[10]
    else:
        assert betas[5] == 0.0
    rates = [row["lr"] for row in found[1:]]
    assert rates[stopped:] == [learning_rate(longer, 0.01, step) for step in range(stopped, 12)]
    assert json.loads((out / "adapter" / "annealing.json").read_text())["beta"] == 0.0


def test_a_default_rate_stays_when_a_run_is_prolonged(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    """So many more passes over few sequences would begin at a lower rate."""
    few = {"learning_rate": None, "warmup": 0.0, "eval_every": 50}
    out = tmp_path / "run"
    train(config(store, tiny_draft, out, **few))
    longer = config(store, tiny_draft, out, **few, steps=40)
    assert longer.peak_learning_rate(10) < max(row["lr"] for row in rows(out)[1:])
    with pytest.raises(StopNowError):
        train(longer, stop_at(8))
    assert rows(out)[7]["lr"] == learning_rate(longer, rows(out)[1]["lr"], 6)


def test_a_run_is_written_by_one_command_at_a_time(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with locked(out), pytest.raises(UserError, match="another afaspec train is writing here"):
        train(config(store, tiny_draft, out))
    assert not out.exists() or not any(out.iterdir())


def test_a_checkpoint_of_another_version_is_refused(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path / "run")
    with pytest.raises(StopNowError):
        train(settings, stop_at(3))
    progress = settings.out / "checkpoint" / "progress.json"
    progress.write_text(json.dumps({"step": 2, "best_acceptance_length": 1.5}))
    with pytest.raises(UserError, match="another version of afaspec"):
        train(settings)
