"""A finished store takes more prompts: what it has stays, byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from afaspec.capture.answers import JOURNAL
from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import CaptureProgress
from afaspec.store.manifest import read_manifest
from afaspec.store.read import FeatureStore
from drafts.errors import UserError
from tests.afaspec.capture.test_server_writer import Server
from tests.opened import capture


def write_rows(path: Path, count: int, word: str = "def") -> Path:
    texts = [f"{word} function_{i}(x):\n" + "    x += 1\n" * (i % 7) for i in range(count)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def settings(tiny_target: Path, tmp_path: Path) -> dict[str, Any]:
    """Three shards of ten prompts, sampled, in batches that do not divide them."""
    return {
        "target": str(tiny_target), "prompts": str(write_rows(tmp_path / "rows.jsonl", 25)),
        "out": tmp_path / "store", "layer_ids": "1,2,3", "max_new_tokens": 12, "batch_size": 4,
        "temperature": 0.8, "limit": 10, "shard_mib": 0.1, "device": "cpu",
    }  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_a_higher_limit_adds_prompts(settings: dict[str, Any], tmp_path: Path) -> None:
    capture(CaptureConfig(**settings))
    before = digests(settings["out"])
    seen: list[CaptureProgress] = []
    said: list[str] = []
    store = capture(CaptureConfig(**settings | {"limit": 21}), seen.append, said.append)
    after = digests(settings["out"])
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: digest for name, digest in before.items() if name != "manifest.json"
    }
    assert [store[i].prompt_index for i in range(10)] != list(range(10))  # in batches, as ever
    assert sorted(sequence.prompt_index for sequence in store) == list(range(21))
    assert "21 prompts with the target's responses, 10 of them done" in said[0]
    assert seen[0].done >= 10
    manifest = read_manifest(settings["out"])
    assert manifest.complete
    assert manifest.settings["grown"] == [{"limit": 10, "prompts": 10}]
    assert manifest.settings["limit"] == 21
    again: list[str] = []
    capture(CaptureConfig(**settings | {"limit": 21}), note=again.append)
    assert "is already complete: 21 sequences" in again[-1]
    whole = capture(CaptureConfig(**settings | {"limit": None}))  # once more, to the file's end
    assert len(whole) == 25
    assert [before["prompts"] for before in whole.manifest.settings["grown"]] == [10, 21]
    at_once = capture(CaptureConfig(**settings | {"limit": None, "out": tmp_path / "at once"}))
    asked = [sorted(map(one.prompt_ids, range(25))) for one in (whole, at_once)]
    assert asked[0] == asked[1]


def test_rows_appended_to_the_file_are_added(settings: dict[str, Any]) -> None:
    settings |= {"limit": None}
    capture(CaptureConfig(**settings))
    old = FeatureStore.open(settings["out"]).manifest.content_sha256
    write_rows(Path(settings["prompts"]), 31)
    store = capture(CaptureConfig(**settings))
    assert len(store) == 31
    assert store.manifest.content_sha256 != old  # a training does not go on unawares


def test_growth_that_is_killed_ends_with_the_same_bytes(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    capture(CaptureConfig(**settings))
    start = tmp_path / "start"
    shutil.copytree(settings["out"], start)
    more = settings | {"limit": 25}
    capture(CaptureConfig(**more))
    whole = digests(settings["out"])

    def stop(now: CaptureProgress, at: float) -> None:
        if now.done >= at:
            raise KeyboardInterrupt

    for at in (10.5, 15, 19, 24.5):
        folder = tmp_path / f"killed-{at}"
        shutil.copytree(start, folder)
        config = CaptureConfig(**more | {"out": folder})
        with pytest.raises(KeyboardInterrupt):
            capture(config, lambda now, at=at: stop(now, at))  # type: ignore[misc]
        assert not read_manifest(folder).complete
        capture(config)
        assert digests(folder) == whole


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"limit": 9}, "limit was 10, now it is 9"),
        ({"limit": 20, "max_new_tokens": 9}, "max_new_tokens was 12, now it is 9"),
        ({"limit": 20, "temperature": 0.0}, "temperature was 0.8, now it is 0.0"),
        ({"limit": 20, "word": "class"}, "limit was 10, now it is 20"),
        ({"word": "class"}, "the prompts' content was "),
    ],
)
def test_other_settings_or_first_prompts_are_refused(
    change: dict[str, Any], complaint: str, settings: dict[str, Any]
) -> None:
    capture(CaptureConfig(**settings))
    before = digests(settings["out"])
    if word := change.pop("word", None):
        write_rows(Path(settings["prompts"]), 25, word)
    with pytest.raises(UserError, match=complaint):
        capture(CaptureConfig(**settings | change))
    assert digests(settings["out"]) == before


def test_a_server_is_asked_for_the_new_answers_alone(settings: dict[str, Any]) -> None:
    settings |= {"temperature": 0.0}
    with Server() as server:
        capture(CaptureConfig(**settings, generate_with=server.url))
        assert len(server.bodies) == 10
        store = capture(CaptureConfig(**settings | {"limit": 17}, generate_with=server.url))
    assert len(server.bodies) == 17
    assert not (settings["out"] / JOURNAL).exists()
    for sequence in store:
        prompt = sequence.input_ids[~sequence.loss_mask]
        assert sequence.input_ids[sequence.loss_mask].tolist() == [7, len(prompt), 9]
