"""The arms of a run from the command line's words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from afaspec.config import load_config
from bench.records.arms import choose_arms
from bench.records.config import BenchConfig
from drafts.errors import UserError


def test_order_and_labels(tmp_path: Path) -> None:
    arms = choose_arms([f"base={tmp_path}", f"mine={tmp_path}"], ngram=True)
    assert [arm.name for arm in arms] == ["none", "ngram", "base", "mine"]
    assert [arm.label for arm in arms][2:] == ["Base draft", "mine"]
    assert [arm.name for arm in choose_arms([str(tmp_path)], none=False)] == [tmp_path.name]


@pytest.mark.parametrize(
    ("drafts", "said"),
    [
        (["base=/nowhere/at/all"], "no such folder"),
        (["={tmp}"], "cannot read the draft"),
        (["base="], "cannot read the draft"),
        (["none={tmp}"], "belongs to the arm"),
        (["a={tmp}", "a={tmp}"], "two drafts have the name"),
    ],
)
def test_bad_drafts(tmp_path: Path, drafts: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_arms([text.replace("{tmp}", str(tmp_path)) for text in drafts])


def test_nothing_to_measure() -> None:
    with pytest.raises(UserError, match="nothing to measure"):
        choose_arms([], none=False)


def bench_config(folder: Path, **settings: object) -> BenchConfig:
    """The configuration from a YAML file, which JSON is."""
    file = folder / "bench.yaml"
    file.write_text(json.dumps({"target": "t", "prompts": "p", "arms": [], **settings}))
    return load_config(BenchConfig, file, {})


@pytest.mark.parametrize("setting", ["k", "max_tokens", "rounds", "concurrency"])
def test_settings_below_one(setting: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{setting} is 0"):
        bench_config(tmp_path, **{setting: 0})


def test_other_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="temperature"):
        bench_config(tmp_path, temperature=-1)
    with pytest.raises(UserError, match="split is 'test'"):
        bench_config(tmp_path, split="test")
