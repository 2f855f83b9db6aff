"""SIGKILL at 20 random moments: no half-written file, and the same bytes in the end."""

from __future__ import annotations

import contextlib
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

from afaspec.store.manifest import read_manifest
from afaspec.store.read import FeatureStore
from tests.nursery import Nursery, is_alive

KILLS = 20
KILLS_IN_WRITING = 6  # after those, more at the moment that a temporary file is seen
PROMPTS = 32


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def wait_for_start(manifest: Path, before: int | None, process: int) -> float:
    """Wait until the run has written its first manifest, or is over; returns that moment."""
    while written(manifest) == before and is_alive(process):
        time.sleep(0.002)
    return time.monotonic()


def wait_for_temporary(folder: Path, process: int) -> None:
    """Wait until a file is being written, or the process is over."""
    while is_alive(process) and not any(name.startswith(".") for name in os.listdir(folder)):
        pass


def written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def check_visible_files(folder: Path) -> None:
    """What stands under its final name is whole."""
    manifest = read_manifest(folder)
    assert not manifest.complete
    FeatureStore.open(folder, allow_incomplete=True, verify=True)
    for path in folder.glob("shard-*.safetensors"):
        assert path.stat().st_size > 1000


@pytest.mark.timeout(600)
def test_killed_captures_end_with_the_same_bytes(
    nursery: Nursery, tiny_target: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = (f"def f_{i}(x):\n    y = x\n" * (1 + i % 3) for i in range(PROMPTS))
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = [
        "capture", tiny_target, rows, "--layer-ids", "1,2,3", "--max-new-tokens", 24,
        "--batch-size", 4, "--shard-mib", 0.1, "--temperature", 0.7, "--device", "cpu",
    ]  # fmt: skip

    whole = tmp_path / "whole"
    process = nursery.start(*options, "--out", whole)
    started = wait_for_start(whole / "manifest.json", None, process)
    assert nursery.wait() == 0
    duration = time.monotonic() - started
    expected = digests(whole)
    assert len(read_manifest(whole).shards) >= 4

    rng = random.Random(0)
    out = tmp_path / "killed"
    manifest = out / "manifest.json"
    kills = finished = leftovers = 0
    while kills < KILLS + KILLS_IN_WRITING or manifest.exists():
        before = written(manifest)
        process = nursery.start(*options, "--out", out)
        if kills < KILLS + KILLS_IN_WRITING:
            wait_for_start(manifest, before, process)
            time.sleep(rng.uniform(0, 0.6 * duration))
            if kills >= KILLS:
                wait_for_temporary(out, process)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        status = nursery.wait()
        if status == -signal.SIGKILL:
            if read_manifest(out).complete:
                continue  # killed after its last word: the next run finds it complete
            kills += 1
            leftovers += len(list(out.glob(".*")))
            check_visible_files(out)
            continue
        assert status == 0
        assert digests(out) == expected
        finished += 1
        shutil.rmtree(out)
    assert leftovers > 0  # some kills did hit a file in writing
    assert finished >= 2
    print(f"{kills} kills, {finished} finished stores, {leftovers} temporary files cleaned up")
