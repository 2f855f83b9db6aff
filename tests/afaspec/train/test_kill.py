"""SIGKILL at random moments of training and of merging: identical results, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from drafts.tensors import open_tensors
from tests.nursery import Nursery, is_alive
from tests.tiny.store import write_store

KILLS = 20


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("kill") / "store", tiny_target, tiny_draft)


def digests(folder: Path) -> dict[str, str]:
    """What a run's result is: every file's hash, times and paths left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("manifest.json", "config.json", "progress.json"):
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check_whole(folder: Path) -> None:
    """What stands under a final name can be read to its end."""
    for path in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            with safe_open(path, framework="pt") as file:
                assert list(file.keys())
    for path in folder.rglob("*.json"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            json.loads(path.read_text())


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.endswith((".tmp", ".old"))]


def kill_at_random(
    nursery: Nursery, arguments: list[object], out: Path, wait_for: Path, span: float, seed: int
) -> int:
    """Start, kill within `span` seconds after `wait_for` appears, and resume, KILLS times."""
    rng, kills = random.Random(seed), 0
    while kills < KILLS:
        process = nursery.start(*arguments)
        while not wait_for.exists() and is_alive(process):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, span))
        if is_alive(process):
            os.kill(process, signal.SIGKILL)
        if nursery.wait() == -signal.SIGKILL:
            kills += 1
            check_whole(out.parent)
        elif out.exists():  # it finished before the kill: begin anew
            shutil.rmtree(out)
    return kills


@pytest.mark.timeout(900)
def test_killed_trainings_end_with_the_same_weights(
    nursery: Nursery, store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    options: list[object] = ["train", "--store", store, "--draft", tiny_draft, "--rank", 4]
    options += ["--steps", 24, "--eval-every", 6, "--checkpoint-every", 3, "--batch-size", 2]
    options += ["--no-compiled", "--no-tensorboard", "--learning-rate", 0.01]
    whole, out = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    nursery.start(*options, "--out", whole)
    while not (whole / "metrics.jsonl").exists():
        time.sleep(0.002)
    started = time.monotonic()
    assert nursery.wait() == 0
    span = 0.5 * (time.monotonic() - started)

    arguments = [*options, "--out", out]
    assert kill_at_random(nursery, arguments, out, out / "metrics.jsonl", span, seed=1) == KILLS
    nursery.start(*arguments)
    assert nursery.wait() == 0
    assert digests(out) == digests(whole)
    assert not leftovers(tmp_path)


@pytest.mark.timeout(600)
def test_killed_merges_leave_all_or_nothing(
    nursery: Nursery, store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options: list[object] = ["train", "--store", store, "--draft", tiny_draft, "--out", run]
    options += ["--steps", 4, "--eval-every", 4, "--no-compiled", "--no-tensorboard"]
    nursery.start(*options)
    assert nursery.wait() == 0
    whole, out = tmp_path / "whole" / "merged", tmp_path / "killed" / "merged"
    started = time.monotonic()
    nursery.start("merge", run, "--out", whole)
    assert nursery.wait() == 0
    span = time.monotonic() - started

    out.parent.mkdir()
    rng, kills, seen = random.Random(2), 0, 0
    while kills < KILLS or not seen:  # some kills must hit a merge in writing
        process = nursery.start("merge", run, "--out", out)
        if kills % 2:  # every other kill comes while a temporary folder stands there
            while is_alive(process) and not leftovers(out.parent):
                pass
        else:
            time.sleep(rng.uniform(0, span))
        if is_alive(process):
            os.kill(process, signal.SIGKILL)
        if nursery.wait() == -signal.SIGKILL:
            kills += 1
            seen += len(leftovers(out.parent))
            if out.exists():
                open_tensors(out)
                assert digests(out) == digests(whole)
    nursery.start("merge", run, "--out", out)
    assert nursery.wait() == 0
    assert digests(out) == digests(whole)
    assert not leftovers(out.parent)
