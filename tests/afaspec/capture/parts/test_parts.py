"""A capture by several workers: the same store whoever does which part, and whatever is killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from afaspec.capture.config import CaptureConfig
from afaspec.capture.parts.part import FOLDER
from afaspec.capture.parts.run import wanted
from afaspec.store.manifest import read_manifest
from afaspec.store.read import FeatureStore
from afaspec.store.write import locked
from drafts.errors import UserError
from tests.opened import capture, capture_in_parts

PROMPTS, PART = 24, 4


@pytest.fixture
def settings(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "def f{i}(x, y): return x[{i}]"}}\n' for i in range(PROMPTS))
    )
    return {
        "target": str(tiny_target), "draft": str(tiny_draft), "prompts": str(rows),
        "max_new_tokens": 16, "temperature": 1.0, "batch_size": 2, "part_prompts": PART,
        "shard_mib": 0.02, "device": "cpu",
    }  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }


def flags(settings: dict[str, Any]) -> list[str]:
    named = {key: value for key, value in settings.items() if key not in ("target", "prompts")}
    pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in named.items()]
    return [settings["target"], settings["prompts"], *(part for pair in pairs for part in pair)]


def test_parts_make_one_store(settings: dict[str, Any], tmp_path: Path) -> None:
    config = CaptureConfig(**settings, out=tmp_path / "parts")
    store = capture_in_parts(config)
    assert not (config.out / FOLDER).exists()
    manifest = store.manifest
    assert (manifest.complete, manifest.sequences) == (True, PROMPTS)
    assert manifest.settings["part_prompts"] == PART
    assert len(manifest.shards) >= PROMPTS // PART
    FeatureStore.open(config.out, verify=True)
    assert sorted(store.prompt_index(i) for i in range(len(store))) == list(range(PROMPTS))
    # As sequences go into training they are those of a capture without parts, prompt for prompt.
    whole = capture(CaptureConfig(**settings, out=tmp_path / "whole"))
    prompts = [{one.prompt_ids(i) for i in range(PROMPTS)} for one in (store, whole)]
    assert prompts[0] == prompts[1]
    assert capture(config).manifest == manifest  # complete, to a capture without parts too
    assert not wanted(config)
    # Each part draws by itself: the same draws in two of them would be the same answers.
    answers = {tuple(s.input_ids[s.loss_mask].tolist()) for s in store}
    assert len(answers) == PROMPTS


def test_a_kill_while_parts_are_joined_loses_nothing(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = capture_in_parts(CaptureConfig(**settings, out=tmp_path / "whole"))
    config = CaptureConfig(**settings, out=tmp_path / "killed")
    replace, moves = os.replace, 0

    def stop(source: Any, target: Any) -> None:
        nonlocal moves
        if Path(source).parent.parent.name == FOLDER and Path(target).parent == config.out:
            moves += 1
            if moves == 4:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            capture_in_parts(config)
    assert (config.out / FOLDER).exists()
    assert wanted(config)
    capture_in_parts(config)
    assert digests(config.out) == digests(whole.folder)
    assert read_manifest(config.out).shards == whole.manifest.shards


def test_other_settings_do_not_go_on(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "store"
    with pytest.raises(InterruptedError):
        capture_in_parts(CaptureConfig(**settings, out=out), on_progress=stop_at_second_part)
    for change, said in (
        ({"part_prompts": 5}, "begun with parts of 4 prompts, now it is 5"),
        ({"temperature": 0.5}, "temperature was 1.0, now it is 0.5"),
    ):
        with pytest.raises(UserError, match=said):
            capture_in_parts(CaptureConfig(**(settings | change), out=out))
    assert capture_in_parts(CaptureConfig(**settings, out=out)).prompts == PROMPTS


def test_what_lies_there_is_replaced_or_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    config = CaptureConfig(**settings, out=tmp_path / "store")
    store = capture_in_parts(config)
    before = digests(store.folder)
    other = CaptureConfig(**(settings | {"seed": 1}), out=config.out, overwrite=True)
    assert capture_in_parts(other).manifest.settings["seed"] == 1
    assert digests(config.out) != before
    again = CaptureConfig(**settings, out=config.out, overwrite=True)
    capture_in_parts(again)
    assert digests(config.out) == before
    notes: list[str] = []
    capture_in_parts(config, note=notes.append)
    assert "holds a store already" in notes[0]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="a folder with other files in it"):
            capture_in_parts(CaptureConfig(**settings, out=foreign, overwrite=overwrite))
    assert (foreign / "thesis.txt").exists()
    with locked(config.out), pytest.raises(UserError, match="another afaspec capture"):
        capture_in_parts(again)
    assert digests(config.out) == before


def stop_at_second_part(now: Any) -> None:
    if now.done > PART:
        raise InterruptedError


def test_workers_and_their_command_may_be_killed(settings: dict[str, Any], tmp_path: Path) -> None:
    """A worker with SIGKILL, then the command itself, then a worker of the next one."""
    torch.set_num_threads(1)  # as each of two workers has: sums of other threads round otherwise
    whole = capture_in_parts(CaptureConfig(**settings, out=tmp_path / "whole"))
    out = tmp_path / "store"
    command = [sys.executable, "-m", "afaspec", "capture", *flags(settings)]
    command += ["--workers", "2", "--out", str(out)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        kill_a_worker(running.pid)
        wait_for(lambda: any((out / FOLDER).glob("*/shard-*")), running)
    finally:
        running.kill()
        running.communicate()
    assert not (out / "manifest.json").exists()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        kill_a_worker(running.pid)
        said, _ = running.communicate(timeout=600)
    finally:
        running.kill()
    assert running.returncode == 0, said.decode()
    assert digests(out) == digests(whole.folder)
    assert read_manifest(out).shards == whole.manifest.shards


def kill_a_worker(command: int) -> None:
    """The first one that the command has, as soon as there is one."""

    def find() -> psutil.Process | None:
        for process in psutil.Process(command).children(recursive=True):
            try:
                if "RemoteWorker" in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    found: list[psutil.Process] = []

    def look() -> bool:
        found.extend(filter(None, [find()]))
        return bool(found)

    wait_for(look)
    found[0].send_signal(signal.SIGKILL)


def wait_for(what: Any, running: subprocess.Popen[bytes] | None = None) -> None:
    end = time.monotonic() + 300
    while not what():
        assert time.monotonic() < end
        if running is not None and running.poll() is not None:
            pytest.fail(running.communicate()[0].decode())
        time.sleep(0.05)
